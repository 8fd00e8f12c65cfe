// The decode chain as a library that runs on a CPU: see hopper.cuh beside this file.

#include <decode_chain.cu>

extern "C" void run(const Params* params, unsigned seed) {
    emulator::launch(GRID, CONSUMERS + 64, SHARED_BYTES, seed, [=] { decode_chain(*params); });
}

extern "C" int params_bytes() { return sizeof(Params); }
