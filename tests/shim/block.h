// A block under way: its threads, each a fiber, and where each of them stands.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace came8bit_shim {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr int kSyncClasses = 8, kRememberedAtomics = 8;

// How threads of a block take turns, and blocks of a grid.
enum Order { kForward, kBackward, kRandom };

enum class State { kReady, kBarrier, kWarp, kDone };

struct Thread {
  Context context;
  Place place;
  unsigned index;
  State state;
  Site site;
  // The warp operation it waits in, and what it gave.
  WarpOp op;
  unsigned mask;
  uint64_t value;
  int source;
  // For the race detector.
  unsigned barriers;
  unsigned warp_syncs[kSyncClasses];
  bool fenced;
  int atomics;
  void* atomic_addresses[kRememberedAtomics];
};

// Waits of one kind alternate between two addresses: who is late at one must not learn from who is
// already at the next.
struct SyncPoints {
  uint64_t begin, end, barrier[2], warp[kMaxThreads / kWarp][kSyncClasses][2];
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<unsigned> turns;
  Order order;
  unsigned waiting[kMaxThreads / kWarp];  // threads of each warp that wait in a warp operation
  Context scheduler;
  SyncPoints sync;
  void (*body)(void*);
  void* closure;
  std::string error;
  std::mt19937_64 random;

  // Has `count` threads stand at the beginning of a kernel, at `place`.
  void prepare(unsigned count, const Place& place);
  // Lets them run, each as far as it gets, until all are done, or sets `error`.
  void run();
};

}  // namespace came8bit_shim
