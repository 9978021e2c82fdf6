// Which schemas this library's kernels take their arguments by: delfast/ops/native.py looks for the digest in the file.
// A note, which linkers put at the beginning, so that it is found at once.
#include <cstdint>

namespace {

struct Note {
  uint32_t name_bytes, bytes, type;
  char name[8], digest[sizeof DELFAST_SCHEMAS + 3];
};

[[gnu::used, gnu::section(".note.delfast")]] alignas(4) const Note note = {sizeof Note::name, sizeof Note::digest, 1,
                                                                           "delfast", DELFAST_SCHEMAS};

}  // namespace
