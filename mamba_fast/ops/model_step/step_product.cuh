// Weight matrices times the vectors of BATCH sequences, by the tensor cores. One warp lets the weights flow from memory
// into a ring in shared memory, in the order in which the others will want them, without waiting for anything they do.
// Macros: IO (1 float16, 2 bfloat16), BATCH (1 to 8), WORKERS, RING, PIECE, FLIGHT.
#define WARPS (WORKERS / 32)        // that multiply; one more brings the weights
#define PART (32 * WARPS)    // columns that the warps take at a time, 32 each
#define TILE 8               // rows that they take at a time
#define GROUP (12 * TILE)    // rows whose sums are in shared memory at a time

__device__ __forceinline__ int warp_number() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }  // a row of a tile, or a sequence
__device__ __forceinline__ int lane_place() { return threadIdx.x % 4; }

__device__ __forceinline__ void unpack_eight(uint4 v, float (&f)[8]) {
  unpack(v.x, f[0], f[1]), unpack(v.y, f[2], f[3]), unpack(v.z, f[4], f[5]), unpack(v.w, f[6], f[7]);
}

__device__ __forceinline__ uint4 pack_eight(const float (&f)[8]) {
  return make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
}

// The part of [0, count) that falls to this block.
struct Share {
  int first, count;
  __device__ Share(int count_of_all, int blocks) {
    first = (int)((int64)count_of_all * blockIdx.x / blocks);
    count = (int)((int64)count_of_all * (blockIdx.x + 1) / blocks) - first;
  }
};

// Rows of a matrix that fall to this block: row r is row first + r of the matrix, from r = half on second + r.
struct Rows {
  const io_t* weight;
  int count, half, first, second;

  __device__ Rows(const io_t* matrix, Share share)
      : weight(matrix), count(share.count), half(share.count), first(share.first), second(0) {}
  __device__ Rows(const io_t* matrix, Share share, int twin)  // and as many, `twin` rows further down
      : weight(matrix), count(2 * share.count), half(share.count), first(share.first), second(twin + share.first - share.count) {}

  __device__ __forceinline__ int of_matrix(int r) const { return r + (r < half ? first : second); }
};

// Rows of K columns that come as one piece of the ring, of PIECE numbers: 1, 2, 4 or 8.
__device__ constexpr int rows_a_piece(int k) { return 8 * k <= PIECE ? 8 : 4 * k <= PIECE ? 4 : 2 * k <= PIECE ? 2 : 1; }

// Pieces of the weights, one after another; everybody counts them for himself.
struct Ring {
  io_t (*pieces)[PIECE];
  gate_t *full, *empty;
  int next;

  // One thread: all these rows, as the others make room. At most FLIGHT pieces are on their way: more would only be in
  // the way of what the blocks have to tell each other.
  template <int K>
  __device__ __forceinline__ void bring(const Rows& rows) {
    constexpr int EACH = rows_a_piece(K);
    for (int row = 0; row < rows.count; row += EACH, next++) {
      int slot = next % RING, live = min(EACH, rows.count - row), cut = min(max(rows.half - row, 0), live);
      if (next >= RING) pass(empty + slot, next / RING - 1);
      if (next >= FLIGHT) pass(full + (next - FLIGHT) % RING, (next - FLIGHT) / RING);
      arrive_and_promise(full + slot, live * K * (int)sizeof(io_t));
      copy<K>(slot, rows, row, 0, cut), copy<K>(slot, rows, row, cut, live);
    }
  }

  // Rows `from` to `to` of the piece that begins with `row`; they are neighbours in memory.
  template <int K>
  __device__ __forceinline__ void copy(int slot, const Rows& rows, int row, int from, int to) {
    if (from == to) return;
    const io_t* source = rows.weight + (int64)rows.of_matrix(row + from) * K;
    copy_bytes(pieces[slot] + from * K, source, (to - from) * K * (int)sizeof(io_t), full + slot);
  }
};

// The product of this block's rows with vectors of K numbers. A warp has 32 columns of every PART, keeps its numbers of
// the vectors in registers, and goes over all rows, TILE at a time.
template <int K>
struct Product {
  static constexpr int PARTS = (K + PART - 1) / PART;

  static __device__ __forceinline__ int column(int part) { return part * PART + warp_number() * 32 + lane_place() * 8; }

  // sums[(warp * GROUP + row) * BATCH + b] of the rows `from` to from + GROUP.
  static __device__ __forceinline__ void run(Ring& ring, int rows, int from, const uint4 (&x)[PARTS], float* sums) {
    constexpr int EACH = rows_a_piece(K);
    for (int row = from; row < min(from + GROUP, rows); row += TILE) {
      int pieces = (min(TILE, rows - row) + EACH - 1) / EACH, mine = ring.next + lane_row() / EACH;
      bool live = lane_row() / EACH < pieces;
      if (live) pass(ring.full + mine % RING, mine / RING);
      const io_t* at = ring.pieces[mine % RING] + lane_row() % EACH * K;
      uint2 none = make_uint2(0, 0);
      float c[4] = {};
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        uint4 w = make_uint4(0, 0, 0, 0), v = x[part];
        if (live && column(part) < K) w = *(const uint4*)(at + column(part));
        multiply(c, make_uint2(w.x, w.y), none, make_uint2(v.x, v.y));
        multiply(c, make_uint2(w.z, w.w), none, make_uint2(v.z, v.w));
      }
      __syncwarp();
      if (threadIdx.x % 32 < pieces) arrive(ring.empty + (ring.next + threadIdx.x % 32) % RING);
      ring.next += pieces;
      float* to = sums + (warp_number() * GROUP + row - from + lane_row()) * BATCH;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (2 * lane_place() + i < BATCH) to[2 * lane_place() + i] = c[i];
    }
  }

  // Calls use(row, b, value, first) for each of this block's results, `first` where a thread has its first one.
  template <class Use>
  static __device__ __forceinline__ void results(Ring& ring, int rows, const uint4 (&x)[PARTS], float* sums, Use use) {
    for (int from = 0; from < rows; from += GROUP) {
      run(ring, rows, from, x, sums);
      meet_in_block(WORKERS);
      for (int i = threadIdx.x; i < min(GROUP, rows - from) * BATCH; i += WORKERS) {
        float value = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) value += sums[warp * GROUP * BATCH + i];
        use(from + i / BATCH, i % BATCH, value, from == 0 && i < WORKERS);
      }
      meet_in_block(WORKERS);
    }
  }

  // x from vectors (BATCH, K) that other blocks wrote.
  static __device__ __forceinline__ void read(uint4 (&x)[PARTS], const io_t* vectors) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      int k = column(part);
      bool there = lane_row() < BATCH && k < K;
      x[part] = there ? read_shared((const uint4*)(vectors + lane_row() * K + k)) : make_uint4(0, 0, 0, 0);
    }
  }
};
