// The digest of the schemas by which this library's kernels take their arguments. delfast/ops/native.py searches the
// file for it. It is an ELF note because linkers place notes at the beginning of the file.
#include <cstdint>

namespace {

struct Note {
  uint32_t name_bytes, bytes, type;
  char name[8], digest[sizeof DELFAST_SCHEMAS + 3];
};

[[gnu::used, gnu::section(".note.delfast")]] alignas(4) const Note note = {sizeof Note::name, sizeof Note::digest, 1,
                                                                           "delfast", DELFAST_SCHEMAS};

}  // namespace
