// One token of BATCH sequences through a whole model in one launch; README.md has the phases.

// ranks (BATCH, RANKS) in shared memory: the sum of what all blocks found.
__device__ __forceinline__ void sum_ranks(const Params& p, Room& room, uint32& due) {
#if IN_TWO
  Share share(BATCH * RANKS, BLOCKS);  // a warp a number: its lanes share the blocks out
  for (int i = warp_number(); i < share.count; i += WARPS) {
    float sum = 0.f;
#pragma unroll
    for (int block = threadIdx.x % 32; block < BLOCKS; block += 32)
      sum += read_shared(p.partial + block * BATCH * RANKS + share.first + i);
    for (int hop = 16; hop; hop /= 2) sum += __shfl_xor_sync(~0u, sum, hop);
    if (threadIdx.x % 32 == 0) p.ranks[share.first + i] = rounded(sum);
  }
  meet(p.arrivals, due, BLOCKS, WORKERS);
  for (int i = threadIdx.x; i < BATCH * RANKS; i += WORKERS) room.ranks[i] = read_shared(p.ranks + i);
#else
  for (int i = threadIdx.x; i < READERS * QUADS; i += WORKERS) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 16
    for (int block = i / QUADS; block < BLOCKS; block += READERS) {
      uint4 v = read_shared((const uint4*)p.partial + block * QUADS + i % QUADS);
      sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y);
      sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
    }
    room.shares[i] = sum;
  }
  meet_in_block(WORKERS);
  for (int i = threadIdx.x; i < BATCH * RANKS; i += WORKERS) {
    float sum = 0.f;
    for (int reader = 0; reader < READERS; reader++) sum += ((const float*)room.shares)[reader * QUADS * 4 + i];
    room.ranks[i] = rounded(sum);
  }
#endif
  meet_in_block(WORKERS);
}

// What a block will read of a layer's small tensors comes to the second-level cache meanwhile.
__device__ __forceinline__ void fetch_small(const Layer& layer, Share own) {
  for (int e = 64 * threadIdx.x; e < D_MODEL; e += 64 * WORKERS) fetch_to_l2(layer.norm + e);
  for (int i = threadIdx.x; i < own.count * BATCH; i += WORKERS) {
    int b = i % BATCH, d = own.first + i / BATCH;
    fetch_to_l2(layer.ssm_state + ((int64)b * D_INNER + d) * D_STATE);
    if (b) continue;
    fetch_to_l2(layer.A_log + (int64)d * D_STATE);
    for (int r = 0; r < DT_RANK; r += 64) fetch_to_l2(layer.dt_proj + (int64)d * DT_RANK + r);
  }
}

// y of this block's channels; `ready` is the first channel of these lanes, and the next one is read meanwhile.
__device__ __forceinline__ void advance_all(const Layer& layer, const Params& p, Room& room, Share own, Channel ready) {
  constexpr int GROUPS = WORKERS / LANES, ROUNDS = (OWN * BATCH + GROUPS - 1) / GROUPS;
#pragma unroll 1
  for (int round = 0; round < ROUNDS; round++) {
    int j = threadIdx.x / LANES + round * GROUPS, after = j + GROUPS;
    bool live = j < own.count * BATCH;
    int i = live ? j / BATCH : 0, b = live ? j % BATCH : 0;
    Channel next = ready;
    if (ROUNDS > 1 && after < own.count * BATCH) next.read(layer, after % BATCH, own.first + after / BATCH);
    float u = to_float(room.u[b * PIECES * 16 + i]);
    float y = ready.advance(layer, room.ranks + b * RANKS, b, own.first + i, u, room.z[i * BATCH + b], live);
    if (live && threadIdx.x % LANES == 0) p.y[b * D_INNER + own.first + i] = from_float(y);
    ready = next;
  }
}

// The numbers of a layer and of the end that other blocks' work does not change.
__device__ __forceinline__ void bring_weights(const Params& p, Ring ring, Share own) {
  for (int i = 0; i < LAYERS; i++) {
    ring.bring<D_MODEL>(Rows(p.layers[i].in_proj, own, D_INNER));
    ring.bring<D_INNER>(Rows(p.layers[i].out_proj, Share(D_MODEL, BLOCKS)));
  }
  ring.bring<D_MODEL>(Rows(p.head, Share(p.vocab, BLOCKS)));
}

struct Residual {
  const Params& p;
  int layer;  // before the first one it is the embedding

  __device__ __forceinline__ void operator()(int b, int k, float (&f)[8]) const {
    if (layer == 0) return unpack_eight(read_once(p.embedding + p.tokens[b] * D_MODEL + k), f);
    uint4 low = read_shared((const uint4*)(p.residual + b * D_MODEL + k));
    uint4 high = read_shared((const uint4*)(p.residual + b * D_MODEL + k + 4));
    f[0] = __uint_as_float(low.x), f[1] = __uint_as_float(low.y), f[2] = __uint_as_float(low.z);
    f[3] = __uint_as_float(low.w), f[4] = __uint_as_float(high.x), f[5] = __uint_as_float(high.y);
    f[6] = __uint_as_float(high.z), f[7] = __uint_as_float(high.w);
  }

  __device__ __forceinline__ float operator()(int b, int e) const {
    return layer ? read_shared(p.residual + b * D_MODEL + e) : to_float(p.embedding[p.tokens[b] * D_MODEL + e]);
  }
};

// in_proj, convolution, and this block's part of x_proj.
__device__ __forceinline__ void widen(const Layer& layer, const Params& p, Room& room, Ring& ring, Share own, uint4 (&x)[Product<D_MODEL>::PARTS], Window window) {
  Ranks ranks;
  ranks.read(layer, own, warp_number());
  Product<D_MODEL>::results(ring, 2 * own.count, x, room.sums, [&](int row, int b, float value, bool first) {
    if (row >= own.count) {
      room.z[(row - own.count) * BATCH + b] = rounded(value);
      return;
    }
    if (!first) window.read(layer, b, own.first + row);
    room.u[b * PIECES * 16 + row] = window.step(layer, b, own.first + row, value);
  });
  for (int tile = warp_number(); tile * 16 < RANKS; tile += WARPS) {
    if (tile >= WARPS) ranks.read(layer, own, tile);
    ranks.write(p, room.u, tile);
  }
}

__device__ __forceinline__ void work(const Params& p, Room& room, Ring ring, Share own) {
  uint32 due = *p.start;
  uint4 x[Product<D_MODEL>::PARTS], y[Product<D_INNER>::PARTS];
  int mine = threadIdx.x / BATCH, sequence = threadIdx.x % BATCH;  // of the products' results
  int channel = threadIdx.x / LANES;                                  // of the recurrence
  Share outs(D_MODEL, BLOCKS), words(p.vocab, BLOCKS);
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = room.layers[i];
    Residual residual{p, i};
    fetch_small(layer, own);
    Window window;
    if (mine < own.count) window.read(layer, sequence, own.first + mine);
    if (i) meet(p.arrivals, due, BLOCKS, WORKERS);
    normalised(x, room.squares, layer.norm, p.eps, residual);
    widen(layer, p, room, ring, own, x, window);
    Channel ready;
    if (channel < own.count * BATCH) ready.read(layer, channel % BATCH, own.first + channel / BATCH);
    float before = mine < outs.count ? residual(sequence, outs.first + mine) : 0.f;
    meet(p.arrivals, due, BLOCKS, WORKERS);
    sum_ranks(p, room, due);
    advance_all(layer, p, room, own, ready);
    meet(p.arrivals, due, BLOCKS, WORKERS);
    Product<D_INNER>::read(y, p.y);
    Product<D_INNER>::results(ring, outs.count, y, room.sums, [&](int row, int b, float value, bool first) {
      p.residual[b * D_MODEL + outs.first + row] = (first ? before : residual(b, outs.first + row)) + rounded(value);
    });
  }
  meet(p.arrivals, due, BLOCKS, WORKERS);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.start = due + (p.choice.columns ? BLOCKS : 0);
  normalised(x, room.squares, p.norm_f, p.eps, Residual{p, LAYERS});
  Product<D_MODEL>::results(ring, words.count, x, room.sums, [&](int row, int b, float value, bool) {
    p.logits[(int64)b * p.vocab + words.first + row] = from_float(value);
  });
  if (p.choice.columns) choose(p, room, due, words);
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1) model_step(const __grid_constant__ Params p) {
  Room& room = *(Room*)memory;
  Share own(D_INNER / 4, BLOCKS);
  own.first *= 4, own.count *= 4;
  for (int i = threadIdx.x; i < LAYERS * sizeof(Layer) / 8; i += WORKERS + 32)
    ((int64*)room.layers)[i] = ((const int64*)p.layers)[i];
  for (int i = threadIdx.x; i < 8 * PIECES * 16; i += WORKERS + 32) room.u[i] = from_float(0.f);
  if (threadIdx.x == 0)
    for (int i = 0; i < RING; i++) make_gate(room.full + i, 1), make_gate(room.empty + i, WARPS);
  if (threadIdx.x == 0) gates_made();
  __syncthreads();
  Ring ring = {room.pieces, room.full, room.empty, 0};
  if (threadIdx.x < WORKERS) work(p, room, ring, own);
  else if (threadIdx.x == WORKERS) bring_weights(p, ring, own);
}
