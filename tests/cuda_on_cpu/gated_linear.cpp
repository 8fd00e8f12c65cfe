// Gate and up as a library that runs on a CPU: see hopper.cuh beside this file.

#include <gated_linear.cu>

// writes: of the kernel ahead, num_writes of them.
extern "C" void run(const Params* params, int num_blocks, unsigned seed,
                    const emulator::Write* writes, int num_writes) {
    emulator::launch(num_blocks, NUM_THREADS, SHARED_BYTES, seed, [=] { gated_linear(*params); },
                     {writes, writes + num_writes});
}

extern "C" int params_bytes() { return sizeof(Params); }
