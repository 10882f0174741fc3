"""A small CUDA C++ program in two files, to compile and launch in tests."""

STRUCT = "struct Params { float* y; long long size; float step; };\n"
ADD = """
extern "C" __global__ void add(Params p) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.size) p.y[i] += p.step * FACTOR;
}
"""


def write_sources(folder, kernel=ADD):
    """The two files, of which the second needs the first."""
    paths = [folder / "params.cuh", folder / "add.cu"]
    for path, text in zip(paths, (STRUCT, kernel), strict=True):
        path.write_text(text)
    return paths
