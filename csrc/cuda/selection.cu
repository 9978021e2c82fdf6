// Launchers of the selection of elements and of units.
#include "cuda/selection_passes.cuh"
#include "cuda/selection_read.cuh"
#include "cuda/selection_sample.cuh"
#include "cuda/selection_units.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

namespace {

constexpr int64_t kResidentBlocks = 1056;  // eight on each of an H100's 132 multiprocessors

// Lays out the workspace of `tiles` tiles of `sources` sources and a list of `capacity` candidates; returns its size in
// bytes.
int64_t lay_out(void* workspace, int64_t sources, int64_t tiles, int64_t capacity, Selection& s) {
  int64_t bytes = 0;
  const auto take = [&]<class T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + bytes);
    bytes += ceil_div(count * int64_t(sizeof(T)), 16) * 16;
  };
  take(s.state, 1);
  take(s.sources, sources);
  take(s.owners, tiles);
  take(s.ties, tiles);
  take(s.segment_weight, ceil_div(tiles, kTieTiles));
  take(s.records, capacity ? tiles : 0);
  take(s.scores, capacity);
  take(s.places, capacity);
  s.tiles = uint32_t(tiles);
  s.capacity = uint32_t(capacity);
  return bytes;
}

unsigned at_most(int64_t blocks, int64_t limit) { return unsigned(blocks < 1 ? 1 : blocks < limit ? blocks : limit); }

// for_sources(add) calls add(Source, tiles) for each parameter with elements, in order. `runs`: runs of the sample in
// each tile; 0: no sample.
template <class ForSources>
Error select(int64_t count, ForSources for_sources, Criterion criterion, int runs, double share, const Selection& s,
             Stream stream) {
  uint32_t first_source = 0;
  const auto begin = [&]<int kBytes>(const Table<Source, kBytes>& table) {
    const int64_t wanted = ceil_div(table.blocks(), kThreads), least = runs ? 64 : 4;  // blocks that clear
    DELFAST_LAUNCH(selection_begin<kBytes>, at_most(wanted > least ? wanted : least, 1024), kThreads, 0, stream, table,
                   s, first_source, runs != 0);
    first_source += uint32_t(table.count);
  };
  if (s.tiles)
    launch_tables<Source>(count, for_sources, begin);
  else
    begin(Table<Source>());
  if (runs) {
    DELFAST_LAUNCH(selection_sample, unsigned(ceil_div(int64_t(s.tiles), kWarps)), kThreads, 0, stream, s, criterion,
                   runs, share);
    DELFAST_LAUNCH(selection_read, unsigned(s.tiles), kThreads, 0, stream, s, criterion);
  }
  const unsigned blocks = at_most(s.tiles, s.units ? INT32_MAX : kResidentBlocks);
  for (int pass = 0; pass < kRadixPasses; pass++)
    DELFAST_LAUNCH(selection_count, blocks, kThreads, 0, stream, s, criterion, pass);
  DELFAST_LAUNCH(selection_mark, blocks, kThreads, 0, stream, s, criterion);
  DELFAST_LAUNCH(selection_settle, blocks, kThreads, 0, stream, s, criterion);
  return last_error();
}

// ---- elements

struct Elements {
  int64_t sources = 0, tiles = 0, numel = 0;
  Elements(const Scored* params, int64_t count) : sources(count) {
    for (int64_t i = 0; i < count; i++) {
      tiles += ceil_div(params[i].layout.numel(), kTile);
      numel += params[i].layout.numel();
    }
  }
  bool sampled(int64_t min_sampled) const { return numel && numel >= min_sampled; }
  // The bracket holds one element in two hundred of large networks, one in fifty of small ones.
  int64_t capacity(int64_t min_sampled) const {
    const int64_t wanted = numel / 32 + 65536;
    return !sampled(min_sampled) ? 0 : wanted < INT32_MAX ? wanted : INT32_MAX;
  }
  int64_t lay_out(void* workspace, int64_t min_sampled, Selection& s) const {
    return cuda::lay_out(workspace, sources, tiles, capacity(min_sampled), s);
  }
  int runs() const { return tiles < 16384 ? 8 : tiles < 65536 ? 4 : 1; }
};

// ---- units

struct Units {
  int64_t sources = 0, tiles = 0, words = 0, units = 0, scalars = 0;
  Units(const int64_t* counts, const int64_t* lengths, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      if (!counts[i]) continue;
      sources++;
      tiles += ceil_div(counts[i], kTile);
      words += ceil_div(counts[i], kWarp);
      units += counts[i];
      scalars += counts[i] * lengths[i];
    }
  }
  // Returns true if one block selects the units.
  bool few() const {
    const bool large = kLargeTables && driver_takes_large_tables();
    return words <= kUnitWords && scalars <= UINT32_MAX &&
           sources <= (large ? Table<UnitsOfParam, kLargeTable>::kEntries : Table<UnitsOfParam>::kEntries);
  }
};

// Calls f(i, first unit, first byte) for each parameter that has units.
template <class F>
void for_params(const int64_t* counts, int64_t count, F f) {
  int64_t unit = 0, byte = 0;
  for (int64_t i = 0; i < count; i++) {
    if (counts[i]) f(i, unit, byte);
    unit += counts[i];
    byte += ceil_div(counts[i], 8);
  }
}

}  // namespace

int64_t select_elements_workspace(const Scored* params, int64_t count, int64_t min_sampled) {
  Selection s;
  return Elements(params, count).lay_out(nullptr, min_sampled, s);
}

Error select_elements(const Scored* params, int64_t count, Criterion criterion, int64_t k, uint8_t* bits,
                      ElementsInfo* info, void* workspace, Stream stream, int64_t min_sampled) {
  const Elements elements(params, count);
  Selection s;
  elements.lay_out(workspace, min_sampled, s);
  s.budget = static_cast<unsigned long long>(k);
  s.elements = info;
  s.units = nullptr;
  s.cut_last = false;
  const auto for_sources = [&](auto add) {
    uint8_t* next = bits;
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; i++) {
      const Scored& p = params[i];
      const int64_t numel = p.layout.numel(), of_param = ceil_div(numel, kTile);
      if (!numel) continue;
      add(Source{{p.theta, p.grad, p.theta_dtype, p.grad_dtype}, p.layout, 1, next, i, 0, uint32_t(tiles)}, of_param);
      tiles += of_param;
      next += ceil_div(numel, 8);
    }
  };
  const bool sampled = elements.sampled(min_sampled) && k < elements.numel;
  return select(count, for_sources, criterion, sampled ? elements.runs() : 0,
                sampled ? double(k) / double(elements.numel) : 1, s, stream);
}

int64_t select_units_workspace(const int64_t* counts, const int64_t* lengths, int64_t count) {
  const Units units(counts, lengths, count);
  Selection s;
  return units.few() ? 0 : lay_out(nullptr, units.sources, units.tiles, 0, s);
}

Error select_units(const float* scores, const int64_t* counts, const int64_t* lengths, int64_t count, int64_t k,
                   bool cut_last, uint8_t* bits, UnitsInfo* info, void* workspace, Stream stream) {
  const Units units(counts, lengths, count);
  if (units.few()) {
    const uint32_t budget = uint32_t(k < int64_t(UINT32_MAX) ? k : UINT32_MAX);
    const auto launch = [&]<int kBytes>(const Table<UnitsOfParam, kBytes>& table) {
      DELFAST_LAUNCH(selection_few_units<kBytes>, 1, kUnitThreads, 0, stream, table, scores, budget, cut_last, bits,
                     info);
    };
    const auto for_entries = [&](auto add) {
      for_params(counts, count, [&](int64_t i, int64_t unit, int64_t byte) {
        add({uint32_t(unit), uint32_t(counts[i]), uint32_t(byte), uint32_t(lengths[i])}, ceil_div(counts[i], kWarp));
      });
    };
    if (units.units)
      launch_tables<UnitsOfParam>(units.sources, for_entries, launch);
    else
      launch(Table<UnitsOfParam>());
    return last_error();
  }
  Selection s;
  lay_out(workspace, units.sources, units.tiles, 0, s);
  s.budget = static_cast<unsigned long long>(k);
  s.elements = nullptr;
  s.units = info;
  s.cut_last = cut_last;
  const auto for_sources = [&](auto add) {
    int64_t tiles = 0;
    for_params(counts, count, [&](int64_t i, int64_t unit, int64_t byte) {
      const int64_t of_param = ceil_div(counts[i], kTile);
      add(Source{{scores + unit, nullptr, Dtype::float32, Dtype::float32},
                 {counts[i], 1, 1},
                 lengths[i],
                 bits + byte,
                 unit,
                 1,
                 uint32_t(tiles)},
          of_param);
      tiles += of_param;
    });
  };
  return select(units.sources, for_sources, Criterion::weight, 0, 1, s, stream);
}

}  // namespace delfast::cuda
