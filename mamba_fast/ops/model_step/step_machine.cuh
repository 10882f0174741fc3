// What the machine gives beyond cuda_machine.cuh: reads past the first-level cache, products of small matrices, and a
// barrier for the whole grid.
extern __shared__ float4 memory[];

// Read once by one warp. Volatile: it stays before the barrier that follows it.
__device__ __forceinline__ uint4 read_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ __forceinline__ uint2 read_once_half(const void* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

// Written by other blocks before the last barrier: from the second-level cache.
__device__ __forceinline__ unsigned long long read_shared(const unsigned long long* from) {
  unsigned long long v;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ float read_shared(const float* from) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ uint4 read_shared(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void fetch_to_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// c (16, 8) += a (16, 16) b (16, 8), float32 sums. Lane 4 g + t has c of rows g and g + 8, columns 2 t and 2 t + 1.
// With `low` and `high` of rows g and g + 8 and b of column g it gives any four of the 16 inner indices, the same in all.
__device__ __forceinline__ void multiply(float (&c)[4], uint2 low, uint2 high, uint2 b) {
#if IO == 1
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b.x), "r"(b.y));
}

// Copies by the memory system itself (from compute capability 9.0 on). A gate opens when as many arrivals as it was made
// for have come, and as many bytes as were promised; it opens once a round, and `round` counts from 0.
typedef int64 gate_t;

__device__ __forceinline__ uint32 place_of(const void* shared) { return (uint32)__cvta_generic_to_shared(shared); }

__device__ __forceinline__ void make_gate(gate_t* gate, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(place_of(gate)), "r"(arrivals) : "memory");
}

// After it other threads, and copies, see the gates that this thread made.
__device__ __forceinline__ void gates_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(gate_t* gate) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(place_of(gate)) : "memory");
}

__device__ __forceinline__ void arrive_and_promise(gate_t* gate, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(place_of(gate)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void pass(gate_t* gate, int round) {
  asm volatile("{.reg .pred open; AGAIN%=: mbarrier.try_wait.parity.shared.b64 open, [%0], %1; @!open bra AGAIN%=;}" ::"r"(
                   place_of(gate)),
               "r"(round & 1)
               : "memory");
}

__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, gate_t* gate) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   place_of(to)),
               "l"(from), "r"(bytes), "r"(place_of(gate))
               : "memory");
}

// A barrier of the first `count` threads of the block.
__device__ __forceinline__ void meet_in_block(int count) { asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory"); }

// One thread of each block. Whether its block is the last one that comes; that one sees what the others wrote before.
// `due` is what `arrivals` reads when all have come.
__device__ __forceinline__ bool came_last(uint32* arrivals, uint32 due) {
  uint32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before + 1 == due;
}

// Returns when the first `count` threads of every block of the grid have come here, with what they wrote before. All
// blocks have to be on the chip at the same time. `arrivals` counts up from launch to launch; `due` is what it reads when
// all are here.
__device__ __forceinline__ void meet(uint32* arrivals, uint32& due, int blocks, int count) {
  due += blocks;
  meet_in_block(count);
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    uint32 seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while ((int)(seen - due) < 0);
  }
  meet_in_block(count);
}
