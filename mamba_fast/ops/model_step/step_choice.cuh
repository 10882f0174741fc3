// The likeliest token of every sequence, put where the next step reads it: see next_token. Each block finds the best of
// its logits, and the block that comes last the best of these.
typedef unsigned long long uint64;

// Orders logits, and of equals the first column is the greatest. NaN counts as the least.
__device__ __forceinline__ uint64 rank_of(float v, int column) {
  const uint32 bits = __float_as_uint(v == v ? v + 0.f : __uint_as_float(0xff800000u));  // without a -0
  return (uint64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~(uint32)column;
}

__device__ __forceinline__ uint64 highest_of_warp(uint64 v) {
  for (int hop = 16; hop; hop /= 2) {
    const int from = threadIdx.x % 32 ^ hop;
    const uint64 high = __shfl_sync(~0u, (uint32)(v >> 32), from), other = high << 32 | __shfl_sync(~0u, (uint32)v, from);
    v = v > other ? v : other;
  }
  return v;
}

__device__ __forceinline__ void record(const Choice& c, int b, int64 token) {
  if (c.ends) {
    bool ended = c.finished[b];
    if (ended) token = c.eos[0];
    for (int k = 0; k < c.ends; k++) ended |= token == c.eos[k];
    c.finished[b] = ended;
  }
  const int64 place = c.place[b];
  c.tokens[place * BATCH + b] = token, c.place[b] = place + 1, c.token[b] = token;
}

// After this block has written its logits, those of `words`.
__device__ __forceinline__ void choose(const Params& p, Room& room, uint32 due, Share words) {
  const Choice& c = p.choice;
  const int lane = threadIdx.x % 32, end = min(words.first + words.count, c.columns);
  for (int b = warp_number(); b < BATCH; b += WARPS) {
    uint64 best = 0;
    for (int i = words.first + lane; i < end; i += 32) {
      const uint64 rank = rank_of(to_float(p.logits[(int64)b * p.vocab + i]), i);
      best = rank > best ? rank : best;
    }
    best = highest_of_warp(best);
    if (lane == 0) c.best[blockIdx.x * BATCH + b] = best;
  }
  meet_in_block(WORKERS);
  if (threadIdx.x == 0) room.last = came_last(p.arrivals, due + BLOCKS);
  meet_in_block(WORKERS);
  if (!room.last) return;
  for (int b = warp_number(); b < BATCH; b += WARPS) {
    uint64 best = 0;
    for (int block = lane; block < BLOCKS; block += 32) {
      const uint64 rank = read_shared(c.best + block * BATCH + b);
      best = rank > best ? rank : best;
    }
    best = highest_of_warp(best);
    if (lane == 0) record(c, b, (int64)~(uint32)best);
  }
}
