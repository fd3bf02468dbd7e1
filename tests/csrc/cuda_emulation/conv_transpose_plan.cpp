// The choice of tiles in conv_transpose_config.h as functions of C, for test_conv_transpose_plan.py.
#include "cuda/conv_transpose_config.h"

using namespace gpt4fast;

// size, products and device: as their structs have them.
extern "C" void plan(const int64_t* s, int products, const int64_t* device, int64_t* tile_and_splits) {
  const ConvTransposePlan chosen = plan_conv_transpose({s[0], s[1], s[2], s[3], s[4], s[5]},
                                                       static_cast<Products>(products), {device[0], device[1]});
  tile_and_splits[0] = static_cast<int64_t>(chosen.tile);
  tile_and_splits[1] = chosen.splits;
}

extern "C" int64_t clocks(const int64_t* s, int products, const int64_t* device, int64_t tile, int64_t splits) {
  const auto estimate = [&]<typename Tile>(Tile) {
    return estimate_clocks<Tile>({s[0], s[1], s[2], s[3], s[4], s[5]}, static_cast<Products>(products),
                                 {device[0], device[1]}, splits);
  };
  switch (static_cast<TileChoice>(tile)) {
    case TileChoice::large: return estimate(LargeTile{});
    case TileChoice::medium: return estimate(MediumTile{});
    case TileChoice::small: return estimate(SmallTile{});
    default: return estimate(NarrowTile{});
  }
}
