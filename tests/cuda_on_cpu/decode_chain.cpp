// The decode chain as a library that runs on a CPU: see hopper.cuh beside this file.

#include <decode_chain.cu>

extern "C" void run(const Params* params, unsigned seed) {
    emulator::launch(GRID, THREADS, SHARED_BYTES, seed, [=] { decode_chain(*params); });
}

// Of the last run: places and their bytes; gives how many there are.
extern "C" int prefetched(u64* places, u64* bytes, int most) {
    const auto& all = emulator::machine.prefetched;
    for (int i = 0; i < (int)all.size() && i < most; i++)
        places[i] = (u64)all[i].first, bytes[i] = all[i].second;
    return (int)all.size();
}

extern "C" int params_bytes() { return sizeof(Params); }
