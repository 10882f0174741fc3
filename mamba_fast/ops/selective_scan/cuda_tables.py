"""The sizes by which calls are cut for the CUDA kernels, as measured on an H200; see cuda_plan.py."""

# {(rows of B * D, tokens), at least: the first fields of Cut}. Many rows: few lanes each, so that B and C
# serve several channels and the scan is short. Few rows: warps stand one behind the other, so that there are
# enough of them, on as many multiprocessors as there are. Short sequences get narrower tiles. The backward
# sums over the four channels of a warp by one product, so its lanes and steps are fixed.
FORWARD = {
    (12288, 129): (8, 16, 8, 1, 2048, 2, 1),
    (6144, 129): (8, 16, 4, 1, 2048, 3, 2),
    (3072, 129): (16, 16, 4, 1, 2048, 3, 2),
    (1152, 129): (8, 16, 4, 4, 2048, 3, 2),
    (529, 897): (8, 16, 8, 8, 4096, 2, 1),
    (265, 1537): (16, 16, 8, 8, 4096, 2, 1),
    (133, 1537): (16, 16, 8, 8, 8192, 1, 2),
    (0, 1537): (32, 16, 8, 8, 8192, 1, 2),
    (0, 897): (8, 16, 8, 8, 4096, 2, 1),
    (0, 513): (8, 16, 4, 4, 2048, 3, 2),
    (0, 129): (32, 16, 4, 1, 4096, 3, 2),
    (0, 0): (16, 8, 4, 1, 1024, 4, 1),
}
# Where blocks of 16 channels leave a chip of 132 multiprocessors unevenly filled, blocks of eight are better.
BACKWARD = {
    (5248, 0): (8, 8, 4, 1, 1024, 4, 1),
    (4352, 0): (8, 8, 4, 2, 2048, 2, 2),
    (0, 2049): (8, 8, 4, 1, 1024, 4, 1),
    (3712, 0): (8, 8, 4, 1, 1024, 4, 1),
    (3328, 0): (8, 8, 4, 2, 1024, 4, 1),
    (2560, 0): (8, 8, 4, 2, 2048, 2, 2),
    (1152, 0): (8, 8, 4, 4, 2048, 2, 2),
    (529, 257): (8, 8, 4, 4, 2048, 2, 2),
    (0, 257): (8, 8, 8, 8, 2048, 1, 2),
    (0, 129): (8, 8, 4, 4, 1024, 4, 1),
    (0, 0): (8, 8, 4, 2, 1024, 4, 1),
}
# Where sums in two parts (float32) or, from ROOMY_ROWS on, the starts of packed rows take the registers that
# an unrolled loop would need.
BACKWARD_ROOMY = {
    (3712, 0): (8, 8, 4, 1, 1024, 4, 1),
    (0, 2049): (8, 8, 4, 1, 1024, 4, 1),
    (3072, 0): (8, 8, 4, 2, 1024, 4, 1),
    (1152, 0): (8, 8, 4, 4, 1024, 4, 1),
    (0, 257): (8, 8, 8, 8, 2048, 2, 1),
    (0, 129): (8, 8, 4, 4, 1024, 4, 1),
    (0, 0): (8, 8, 4, 2, 1024, 4, 1),
}
ROOMY_ROWS = 1152
# From so many states on, in 16 bits: a block fills the shared memory of half a multiprocessor or more.
MANY_STATES = 64
BACKWARD_MANY_STATES = {
    (3712, 0): (8, 8, 8, 1, 4096, 1, 2),
    (3711, 0): (8, 8, 4, 1, 2048, 2, 2),  # where eight warps are too many
}
# For sums in one order: those of a block are over warps that hold the same tokens, and the more of them, the
# less is left to add up later.
ORDERED = {
    (12288, 0): (8, 8, 8, 1, 1024, 2, 1),
    (2048, 0): (8, 8, 4, 1, 1024, 4, 1),
    (0, 1): (8, 8, 8, 1, 1024, 2, 1),
    (0, 0): (8, 8, 4, 1, 1024, 4, 1),  # where eight warps are too many
}
SHARED_OF_MANY_WARPS = 200 * 1024  # bytes a block may have, for blocks of more than four warps
# Where many states leave no room for more warps.
LAST = ((8, 8, 2, 1, 512, 8, 1), (8, 8, 1, 1, 256, 16, 1))
# Warps a multiprocessor: with fewer in a call than the first number its sequences are cut into stretches, so
# that there are about as many as the second at most. At six, the forward loses more by finding what enters a
# stretch than it gains.
STRETCHED_FORWARD, STRETCHED_BACKWARD = (5, 16), (7, 48)
