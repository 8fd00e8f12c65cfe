#include <decode_chain.cu>

extern "C" void run(const Params* params, unsigned seed) {
    emulator::launch(GRID, CONSUMERS + 64, SHARED_BYTES, seed, [=] { decode_chain(*params); });
}
extern "C" int params_bytes() { return sizeof(Params); }
extern "C" int layer_bytes() { return sizeof(Layer); }
