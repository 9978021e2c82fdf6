// A long sum, shared by criticality and channel_dot. Included like score.inl.
//
// Numerics. 16 interleaved partial sums are kept in float32 for kBlock elements, then added to 16 partial sums in
// double, which are added pairwise at the end: the order depends only on the length.

constexpr int64_t kBlock = 512;

class Sum {
 public:
  void add(Vec v) {
    block_ = block_ + v;
    if (++pending_ == kBlock / 16) flush();
  }
  double total() {
    flush();
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; i++) lanes_[i] += lanes_[i + width];
    return lanes_[0];
  }

 private:
  void flush() {
    float lanes[16];
    block_.store(lanes);
    for (int i = 0; i < 16; i++) lanes_[i] += double(lanes[i]);
    block_ = Vec::broadcast(0);
    pending_ = 0;
  }
  Vec block_ = Vec::broadcast(0);
  double lanes_[16] = {};
  int pending_ = 0;
};

template <class Score>
double sum_row(const Score& score, int64_t length) {
  Sum sum;
  for_groups(score, 0, length, [&](Vec v, int64_t, int) { sum.add(v); });
  return sum.total();
}
