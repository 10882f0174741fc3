// What passes from token to token, and where packed sequences let nothing pass.
constexpr float SHUT = -1.f;  // a decay that says: a packed sequence starts in between, nothing passes

// What the steps of a lane, a tile or several of them do to a state that comes from their left or to a flow that comes
// from their right.
struct Effect {
  float decay, x;
};

template <bool CUT>
__device__ __forceinline__ float pass(Effect effect, float state) {
  return CUT && effect.decay == SHUT ? effect.x : fmaf(effect.decay, state, effect.x);
}

// Is token t the first one of a packed sequence?
__device__ __forceinline__ bool starts_at(const int* seq, int t, int seqlen) {
  return t < seqlen && (t > 0 ? seq[t] != seq[t - 1] : VARLEN);
}

// Where packed sequences start in the next AHEAD tiles of a warp: read for all of them at once, from the bits that
// scan_starts has written. A lane holds 32 tokens, and WORDS lanes hold a tile.
constexpr int WORDS = TILE / 32, AHEAD = 32 / WORDS;
struct Starts {
  int window;         // which AHEAD tiles; -1: none yet
  uint32 word;
  bool after;         // of the token behind the 32; where somebody wants to know (VARLEN)
};

__device__ __forceinline__ void find_starts(Starts& starts, const Params& p, int begin, int t0, const Place& w) {
  const int window = (t0 - begin) / (AHEAD * BLOCK_L);
  if (window == starts.window) return;
  starts.window = window;
  const int tile = begin + (window * AHEAD + w.lane / WORDS) * BLOCK_L + w.part * TILE, word = tile / 32 + w.lane % WORDS;
  const uint32* row = p.starts + (int64)w.b * p.words;
  starts.word = word < p.words ? row[word] : 0;
  if (VARLEN) starts.after = word + 1 < p.words && row[word + 1] & 1;
}

// t0: the first token of the warp's tile.
__device__ __forceinline__ Cuts find_cuts(const Starts& starts, int begin, int t0, int seqlen, const Place& w) {
  const int distance = t0 - w.part * TILE - begin, place = distance / BLOCK_L % AHEAD * WORDS;
  const int bit = w.j * STEPS % 32, word = place + w.j * STEPS / 32, t = t0 + w.j * STEPS;
  const uint32 here = __shfl_sync(~0u, starts.word, word);
  Cuts cut = {here >> bit & ((1u << STEPS) - 1), 0, w.j, LANES - 1 - w.j, 0, false, false, false};
  const uint32 lanes_of_tile = (1u << (WORDS - 1) << 1) - 1;
  const bool behind = VARLEN && starts.after && w.lane == place + WORDS - 1;
  cut.any = __ballot_sync(~0u, starts.word != 0 || behind) >> place & lanes_of_tile;
  if (VARLEN) {
    const uint32 after = __shfl_sync(~0u, (uint32)starts.after, word);
    cut.ends = cut.starts >> 1 | (bit + STEPS < 32 ? here >> (bit + STEPS) & 1 : after) << (STEPS - 1);
    const int last = seqlen - 1 - t;
    if (last >= 0 && last < STEPS) cut.ends |= 1u << last;
    cut.any |= t0 + TILE >= seqlen;
  }
  if (!cut.any) return cut;
  if (VARLEN) cut.most = __reduce_max_sync(~0u, max(__popc(cut.starts), __popc(cut.ends)));
  const uint32 lanes = __ballot_sync(~0u, cut.starts != 0);  // the same for all channels of the warp
  cut.begun = lanes << (31 - w.lane);
  cut.to_begin = lanes >> (w.j * CHANNELS);
  for (int r = 0; r < LANES; r++) {
    if (w.j - r >= 0 && lanes >> ((w.j - r) * CHANNELS) & 1) cut.reach_left = min(cut.reach_left, r);
    if (w.j + r < LANES && lanes >> ((w.j + r) * CHANNELS) & 1) cut.reach_right = min(cut.reach_right, r);
  }
  return cut;
}
