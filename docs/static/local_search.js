// A page that was opened as a file may not fetch other files, so the search shows titles without excerpts there.
if (window.location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
