// What the machine gives: number formats, special functions, asynchronous copies, shuffles, additions to global memory.
// IO names the type of u, delta, B, C, z and y: 0 float32, 1 float16, 2 bfloat16.
typedef long long int64;
typedef unsigned int uint32;

#if IO == 0
typedef float io_t;
#else
struct io_t {
  unsigned short bits;
};
#endif

__device__ __forceinline__ float to_float(io_t v) {
#if IO == 0
  return v;
#elif IO == 1
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  return __uint_as_float((uint32)v.bits << 16);
#endif
}

__device__ __forceinline__ io_t from_float(float f) {
#if IO == 0
  return f;
#else
  io_t v;
#if IO == 1
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#endif
  return v;
#endif
}

// Two 16-bit numbers of one word; the first one is the low half.
__device__ __forceinline__ void unpack(uint32 word, float& first, float& second) {
#if IO == 1
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(first), "=f"(second)
      : "r"(word));
#else
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
#endif
}

__device__ __forceinline__ uint32 pack(float first, float second) {
  uint32 word;
#if IO == 1
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
  return word;
}

// A kernel that was launched early begins while the one before it ends. This waits until that one has written
// everything; then the next kernel may begin.
__device__ __forceinline__ void take_turn() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The thread's number, read anew: what follows from it need not live in registers from one use to the next.
__device__ __forceinline__ int thread_number() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}

__device__ __forceinline__ float ex2(float x) {  // 2^x, good to 2 in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes to shared memory; those from number `bytes` on become zero, and nothing is read of them.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from),
               "r"(bytes));
}

__device__ __forceinline__ void copy_async_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from));
}

// Waits for this thread's own copies: other threads see them after a barrier.
__device__ __forceinline__ void wait_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One round of a Kogge-Stone scan: (decay, x) of this lane after those of the lane `hop` to the left. Lanes without
// such a neighbour keep theirs. In the last round the decay is no longer needed.
template <bool LAST>
__device__ __forceinline__ void round_from_left(float& x, float& decay, int hop) {
  if (LAST)
    asm("{.reg .pred p; .reg .f32 a; shfl.sync.up.b32 a|p, %0, %2, 0, -1; @p fma.rn.ftz.f32 %0, %1, a, %0;}"
        : "+f"(x)
        : "f"(decay), "r"(hop));
  else
    asm("{.reg .pred p; .reg .f32 a, b; shfl.sync.up.b32 a|p, %0, %2, 0, -1; shfl.sync.up.b32 b, %1, %2, 0, -1;"
        " @p fma.rn.ftz.f32 %0, %1, a, %0; @p mul.rn.ftz.f32 %1, %1, b;}"
        : "+f"(x), "+f"(decay)
        : "r"(hop));
}

template <bool LAST>
__device__ __forceinline__ void round_from_right(float& x, float& decay, int hop) {
  if (LAST)
    asm("{.reg .pred p; .reg .f32 a; shfl.sync.down.b32 a|p, %0, %2, 31, -1; @p fma.rn.ftz.f32 %0, %1, a, %0;}"
        : "+f"(x)
        : "f"(decay), "r"(hop));
  else
    asm("{.reg .pred p; .reg .f32 a, b; shfl.sync.down.b32 a|p, %0, %2, 31, -1; shfl.sync.down.b32 b, %1, %2, 31, -1;"
        " @p fma.rn.ftz.f32 %0, %1, a, %0; @p mul.rn.ftz.f32 %1, %1, b;}"
        : "+f"(x), "+f"(decay)
        : "r"(hop));
}

// The value of the lane `hop` to the left (right); `edge` where there is none.
__device__ __forceinline__ float from_left(float v, float edge, int hop) {
  float w;
  asm("{.reg .pred p; shfl.sync.up.b32 %0|p, %1, %3, 0, -1; @!p mov.b32 %0, %2;}" : "=&f"(w) : "f"(v), "f"(edge), "r"(hop));
  return w;
}

__device__ __forceinline__ float from_right(float v, float edge, int hop) {
  float w;
  asm("{.reg .pred p; shfl.sync.down.b32 %0|p, %1, %3, 31, -1; @!p mov.b32 %0, %2;}"
      : "=&f"(w)
      : "f"(v), "f"(edge), "r"(hop));
  return w;
}

// From and to global memory, which the compiler cannot see of an address that was read from shared memory.
__device__ __forceinline__ uint4 load_global(const uint4* from) {
  uint4 v;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ void store_global(uint4* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Two neighbouring numbers at an address that is a multiple of 8 bytes, each added atomically.
__device__ __forceinline__ void add_global(float* to, float first, float second) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first), "f"(second) : "memory");
#else
  atomicAdd(to, first);
  atomicAdd(to + 1, second);
#endif
}

// What is left of a number without the upper 11 bits of its fraction's digits, which add_product reads.
__device__ __forceinline__ float rest(float v) { return v - __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// sum += a b by the tensor cores, (16, 8) = (16, 8) (8, 8). Lane l holds a0, a1 in rows l / 4 and l / 4 + 8 of column
// l % 4, a2, a3 in column l % 4 + 4; b0, b1 in rows l % 4 and l % 4 + 4 of column l / 4; and of the sum x, y in columns
// 2 (l % 4) and the next one of row l / 4, z, w in row l / 4 + 8. Digits of a and b below the upper 11 are cut off.
__device__ __forceinline__ void add_product(float4& sum, float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
