// What one layer does to one token: norm, convolution, x_proj and the recurrence.
// Macros: those of step_product.cuh, and WIDE_STATES, BLOCKS, LAYERS, D_MODEL, D_INNER, DT_RANK, D_STATE, WIDTH.
#define LOG2E 1.4426950408889634f
#define RANKS (DT_RANK + 2 * D_STATE)                                // rows of x_proj: Δ, B, C
#define OWN ((D_INNER / 4 + BLOCKS - 1) / BLOCKS * 4)                // most channels of a block
#define PIECES ((OWN + 15) / 16)                                     // of 16 channels
#define LANES 4                                                      // of a channel in the recurrence
#define STATES ((D_STATE + LANES - 1) / LANES)                       // of a channel, a lane
#define RANKS_A_LANE ((DT_RANK + 8 * LANES - 1) / (8 * LANES))       // words of 8
#define QUADS (BATCH * RANKS / 4)                                    // float4s of the ranks of all sequences
#define READERS (WORKERS / QUADS > 1 ? WORKERS / QUADS : 1)          // threads that sum up one of them
#define IN_TWO (QUADS > 64)                                         // sums of the ranks: first a share a block, then all

#if WIDE_STATES
typedef float state_t;
__device__ __forceinline__ float from_state(state_t v) { return v; }
__device__ __forceinline__ state_t to_state(float v) { return v; }
#else
typedef io_t state_t;
__device__ __forceinline__ float from_state(state_t v) { return to_float(v); }
__device__ __forceinline__ state_t to_state(float v) { return from_float(v); }
#endif

struct Layer {
  const io_t *norm, *in_proj, *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias;
  const float *A_log, *D;
  const io_t* out_proj;
  state_t *conv_state, *ssm_state;
};

struct Choice {  // the places of next_token's Slots
  const int64* eos;
  int64 *token, *tokens, *place;
  bool* finished;
  unsigned long long* best;  // (BLOCKS, BATCH)
  int columns, ends;         // logits to choose from, none if 0; tokens in eos
};

struct Params {
  const Layer* layers;
  const io_t *embedding, *norm_f, *head;
  const int64* tokens;
  io_t* logits;
  float *residual, *partial, *ranks;  // (BATCH, D_MODEL); (BLOCKS, BATCH, RANKS) and its sum over the blocks
  io_t* y;                    // (BATCH, D_INNER)
  uint32 *arrivals, *start;   // the grid's barrier, and what it read when the last launch ended
  Choice choice;
  int vocab;
  float eps;
};

struct Room {  // shared memory
  io_t pieces[RING][PIECE];
  gate_t full[RING], empty[RING];
  Layer layers[LAYERS];
  float sums[WARPS * GROUP * BATCH];
  float squares[WARPS * 8];
  float z[OWN * BATCH];
  int last;  // whether this block came last
  alignas(16) float ranks[BATCH * RANKS];
  float4 shares[READERS * QUADS];
  io_t u[8 * PIECES * 16];  // (sequence, channel), zeros beyond
};

__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.f + ex2(-LOG2E * v)); }
__device__ __forceinline__ float rounded(float v) { return to_float(from_float(v)); }

// x = RMSNorm of the residual stream; source(b, k, f) gives eight numbers of it.
template <class Source>
__device__ __forceinline__ void normalised(uint4 (&x)[Product<D_MODEL>::PARTS], float* squares, const io_t* weight,
                                           float eps, Source source) {
  constexpr int PARTS = Product<D_MODEL>::PARTS;
  float v[PARTS][8], square = 0.f;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    int k = Product<D_MODEL>::column(part);
    float w[8] = {};
    for (int i = 0; i < 8; i++) v[part][i] = 0.f;
    if (lane_row() < BATCH && k < D_MODEL) source(lane_row(), k, v[part]), unpack_eight(read_once(weight + k), w);
#pragma unroll
    for (int i = 0; i < 8; i++) square += v[part][i] * v[part][i], v[part][i] *= w[i];
  }
  for (int hop = 1; hop < 4; hop *= 2) square += __shfl_xor_sync(~0u, square, hop);
  if (lane_place() == 0) squares[warp_number() * 8 + lane_row()] = square;
  meet_in_block(WORKERS);
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += squares[warp * 8 + lane_row()];
  float scale = rsqrtf(sum / D_MODEL + eps);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    for (int i = 0; i < 8; i++) v[part][i] *= scale;
    x[part] = pack_eight(v[part]);
  }
}

// The window of one channel before this token, and its taps, as they lie in memory: a conversion would wait for them.
struct Window {
  state_t kept[WIDTH];
  io_t taps[WIDTH], bias;

  __device__ __forceinline__ void read(const Layer& layer, int b, int d) {
    const state_t* from = layer.conv_state + ((int64)b * D_INNER + d) * WIDTH;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) kept[k] = from[k], taps[k] = layer.conv[d * WIDTH + k];
    if (layer.conv_bias) bias = layer.conv_bias[d];
  }

  // u = SiLU(conv(x)); the window moves on by x.
  __device__ __forceinline__ io_t step(const Layer& layer, int b, int d, float x) {
    state_t* to = layer.conv_state + ((int64)b * D_INNER + d) * WIDTH;
    float sum = layer.conv_bias ? to_float(bias) : 0.f;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      state_t entry = k + 1 < WIDTH ? kept[(k + 1) % WIDTH] : to_state(rounded(x));
      to[k] = entry;
      sum += from_state(entry) * to_float(taps[k]);
    }
    return from_float(sum * sigmoid(sum));
  }
};

// This block's channels times its columns of x_proj: its part of Δ, B and C of every sequence.
struct Ranks {
  uint2 low[PIECES], high[PIECES];

  __device__ __forceinline__ void read(const Layer& layer, Share own, int tile) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      int k = piece * 16 + lane_place() * 4, row = tile * 16 + lane_row();
      const io_t* from = layer.x_proj + (int64)row * D_INNER + own.first + k;
      bool there = k < own.count;
      low[piece] = there && row < RANKS ? read_once_half(from) : make_uint2(0, 0);
      high[piece] = there && row + 8 < RANKS ? read_once_half(from + 8 * (int64)D_INNER) : make_uint2(0, 0);
    }
  }

  __device__ __forceinline__ void write(const Params& p, const io_t* u, int tile) {
    float c[4] = {};
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
      multiply(c, low[piece], high[piece], *(const uint2*)(u + lane_row() * PIECES * 16 + piece * 16 + lane_place() * 4));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = tile * 16 + lane_row() + i / 2 * 8, b = 2 * lane_place() + i % 2;
      if (row < RANKS && b < BATCH) p.partial[(blockIdx.x * BATCH + b) * RANKS + row] = c[i];
    }
  }
};

// A channel of a sequence in LANES lanes: what `advance` needs of it, read ahead.
struct Channel {
  state_t h[STATES];
  io_t bias;
  float A[STATES], D;
  uint4 dt_proj[RANKS_A_LANE];

  __device__ __forceinline__ void read(const Layer& layer, int b, int d) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int j = 0; j < RANKS_A_LANE; j++) {
      int r = 8 * (lane + LANES * j);
      dt_proj[j] = r < DT_RANK ? read_once(layer.dt_proj + (int64)d * DT_RANK + r) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < STATES; j++) {
      int n = lane * STATES + j;
      if (n >= D_STATE) continue;
      h[j] = layer.ssm_state[((int64)b * D_INNER + d) * D_STATE + n];
      A[j] = layer.A_log[(int64)d * D_STATE + n];
    }
    bias = layer.dt_bias[d], D = layer.D[d];
  }

  // h = exp(Δ A) h + Δ B u, y = (C h + D u) SiLU(z); ranks (RANKS,) of this sequence.
  // Every lane of the warp comes here, and those without a channel (`live` is false) write nothing.
  __device__ __forceinline__ float advance(const Layer& layer, const float* ranks, int b, int d, float u, float z,
                                           bool live) {
    int lane = threadIdx.x % LANES;
    float Delta = 0.f, y = 0.f;
#pragma unroll
    for (int j = 0; j < RANKS_A_LANE; j++) {
      float w[8];
      unpack_eight(dt_proj[j], w);
      int r = 8 * (lane + LANES * j);
      if (r >= DT_RANK) continue;
      float4 low = *(const float4*)(ranks + r), high = *(const float4*)(ranks + r + 4);
      Delta += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w;
      Delta += w[4] * high.x + w[5] * high.y + w[6] * high.z + w[7] * high.w;
    }
    for (int hop = LANES / 2; hop; hop /= 2) Delta += __shfl_xor_sync(~0u, Delta, hop);
    Delta = rounded(Delta) + to_float(bias);
    Delta = Delta > 20.f ? Delta : log1pf(ex2(LOG2E * Delta));
#pragma unroll
    for (int j = 0; j < STATES; j++) {
      int n = lane * STATES + j;
      if (n >= D_STATE) continue;
      float decay = ex2(-LOG2E * Delta * ex2(LOG2E * A[j]));
      float next = decay * from_state(h[j]) + Delta * u * ranks[DT_RANK + n];
      if (live) layer.ssm_state[((int64)b * D_INNER + d) * D_STATE + n] = to_state(next);
      y += next * ranks[DT_RANK + D_STATE + n];
    }
    for (int hop = LANES / 2; hop; hop /= 2) y += __shfl_xor_sync(~0u, y, hop);
    return (y + u * D) * z * sigmoid(z);
  }
};
