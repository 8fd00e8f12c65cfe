// Decode attention as a library that runs on a CPU: see hopper.cuh beside this file.

#include <decode_attention.cu>

extern "C" void run_plan(const Params* params, unsigned seed) {
    emulator::launch(1, PLAN_THREADS, SHARED_BYTES, seed, [=] { plan_shares(*params); });
}

// writes: of the kernel ahead, num_writes of them.
extern "C" void run(const Params* params, unsigned seed, const emulator::Write* writes,
                    int num_writes) {
    emulator::launch(GRID, THREADS, SHARED_BYTES, seed, [=] { decode_attention(*params); },
                     {writes, writes + num_writes});
}

extern "C" int params_bytes() { return sizeof(Params); }
