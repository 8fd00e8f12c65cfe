// Row attention as a library that runs on a CPU: see hopper.cuh beside this file.

#include <row_attention.cu>

extern "C" void run(const Params* params, int num_blocks, unsigned seed) {
    emulator::launch(num_blocks, THREADS, SHARED_BYTES, seed, [=] { row_attention(*params); });
}

extern "C" int params_bytes() { return sizeof(Params); }
