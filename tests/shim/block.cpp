// Barriers, warp operations, fences: how the threads of a block wait for each other.
//
// Compiled without sanitizers, whatever the kernels are compiled with: the bookkeeping is shared by
// fibers that know nothing of each other. What a kernel may rely on is announced: barriers and
// __syncwarp order memory; shuffles and votes do not; an atomic does where fences stand around it.
#include "block.h"

#include <algorithm>
#include <numeric>
#include <sstream>

namespace came8bit_shim {

__thread ThreadState thread_state = {};

namespace {

Block& current_block() {
  return *static_cast<Block*>(thread_state.block);
}
Thread& current_thread() {
  return *static_cast<Thread*>(thread_state.thread);
}

void to_scheduler(Thread& thread) {
  thread.context.switch_to(current_block().scheduler);
}

void thread_entry() {
  Thread& thread = current_thread();
  Block& block = current_block();
  thread.context.arrived();
  acquire(&block.sync.begin);
  block.body(block.closure);
  release(&block.sync.end);
  thread.state = State::kDone;
  to_scheduler(thread);
  abort();  // a thread that is done is not resumed
}

// Ends the block: no thread of it is resumed.
[[noreturn]] void fail(Thread& thread, const std::string& message) {
  current_block().error = message;
  to_scheduler(thread);
  abort();
}

std::string text(const Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

const char* name(WarpOp op) {
  constexpr const char* names[] = {"shuffle",    "ballot",     "any",        "all",
                                   "reduce max", "reduce min", "reduce add", "reduce and",
                                   "reduce or",  "reduce xor", "__syncwarp"};
  return names[static_cast<int>(op)];
}

std::string text(const Thread& t) {
  switch (t.state) {
    case State::kReady:
      return "can go on";
    case State::kBarrier:
      return "wait at __syncthreads in " + text(t.site);
    case State::kWarp: {
      std::ostringstream out;
      out << "wait in a warp " << name(t.op) << " with mask 0x" << std::hex << t.mask << " in "
          << text(t.site);
      return out.str();
    }
    case State::kDone:
      break;
  }
  return "have returned";
}

// "threads 0-31 wait at ..., threads 32-63 have returned"
std::string report(const Block& block) {
  std::ostringstream out;
  const size_t count = block.threads.size();
  for (size_t first = 0; first < count;) {
    const std::string what = text(*block.threads[first]);
    size_t last = first;
    while (last + 1 < count && text(*block.threads[last + 1]) == what) ++last;
    out << (first > 0 ? ", " : "") << "threads " << first << "-" << last << " " << what;
    first = last + 1;
    if (out.tellp() > 1500) {
      out << " ...";
      break;
    }
  }
  return out.str();
}

// --- a warp operation is carried out by the lane that comes last -------------------------------

uint64_t shuffled(Block& block, Thread& reader, unsigned warp_start) {
  if (((reader.mask >> reader.source) & 1u) == 0) {
    block.error = "lane " + std::to_string(reader.index % kWarp) + " reads from lane " +
                  std::to_string(reader.source) + ", which its mask leaves out, in " +
                  text(reader.site);
    return 0;
  }
  return block.threads[warp_start + reader.source]->value;
}

uint64_t reduced(WarpOp op, const std::vector<Thread*>& lanes) {
  uint64_t result = lanes.front()->value;
  if (op == WarpOp::kBallot) result = 0;
  for (const Thread* lane : lanes) {
    const uint64_t x = lane->value;
    switch (op) {
      case WarpOp::kBallot:
        result |= (x != 0 ? uint64_t{1} : 0) << (lane->index % kWarp);
        break;
      case WarpOp::kAny:
      case WarpOp::kOr:
        result |= x;
        break;
      case WarpOp::kAll:
      case WarpOp::kAnd:
        result &= x;
        break;
      case WarpOp::kMax:
        result = std::max(result, x);
        break;
      case WarpOp::kMin:
        result = std::min(result, x);
        break;
      case WarpOp::kAdd:
        result += lane == lanes.front() ? 0 : x;
        break;
      case WarpOp::kXor:
        result ^= lane == lanes.front() ? 0 : x;
        break;
      default:
        break;
    }
  }
  return static_cast<uint32_t>(result);
}

void complete(Block& block, const std::vector<Thread*>& lanes, unsigned warp_start) {
  const WarpOp op = lanes.front()->op;
  std::vector<uint64_t> results(lanes.size());
  for (size_t i = 0; i < lanes.size(); ++i) {
    results[i] = op == WarpOp::kShuffle ? shuffled(block, *lanes[i], warp_start) : 0;
  }
  const uint64_t common = op == WarpOp::kShuffle ? 0 : reduced(op, lanes);
  for (size_t i = 0; i < lanes.size(); ++i) {
    lanes[i]->value = op == WarpOp::kShuffle ? results[i] : common;
    lanes[i]->state = State::kReady;
  }
}

void resume(Block& block, Thread& thread) {
  thread_state.place = &thread.place;
  thread_state.thread = &thread;
  block.scheduler.switch_to(thread.context);
}

}  // namespace

void Block::prepare(unsigned count, const Place& place) {
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.place = place;
    t.place.thread = {i, 0, 0};
    t.index = i;
    t.state = State::kReady;
    t.barriers = 0;
    std::fill(std::begin(t.warp_syncs), std::end(t.warp_syncs), 0u);
    t.fenced = false;
    t.atomics = 0;
    t.context.prepare(thread_entry);
  }
  std::fill(std::begin(waiting), std::end(waiting), 0u);
  turns.resize(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == kBackward) std::reverse(turns.begin(), turns.end());
}

void Block::run() {
  const size_t count = threads.size();
  for (;;) {
    if (order == kRandom) {
      std::shuffle(turns.begin(), turns.end(), random);
    }
    bool progress = false;
    for (const unsigned i : turns) {
      Thread& thread = *threads[i];
      if (thread.state != State::kReady) continue;
      progress = true;
      resume(*this, thread);
      if (!error.empty()) return;
    }
    if (progress) continue;
    size_t done = 0, waiting = 0;
    for (const auto& thread : threads) {
      done += thread->state == State::kDone;
      waiting += thread->state == State::kBarrier && same(thread->site, threads[0]->site);
    }
    if (done == count) return;
    if (waiting != count) {
      error = "not all threads reach the same point: " + report(*this);
      return;
    }
    for (const auto& thread : threads) thread->state = State::kReady;
  }
}

// --- what kernels call -------------------------------------------------------------------------

int lane() {
  return static_cast<int>(current_thread().index % kWarp);
}

void block_barrier(Site site) {
  Thread& thread = current_thread();
  Block& block = current_block();
  uint64_t* const sync = &block.sync.barrier[thread.barriers++ % 2];
  thread.state = State::kBarrier;
  thread.site = site;
  release(sync);
  to_scheduler(thread);
  acquire(sync);
}

uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  Thread& thread = current_thread();
  Block& block = current_block();
  const unsigned warp = thread.index / kWarp, start = warp * kWarp;
  const unsigned present = std::min<unsigned>(kWarp, thread.place.block_dim.x - start);
  const unsigned all = present == kWarp ? 0xffffffffu : (1u << present) - 1;
  // A last warp that is not full may be named in full.
  const unsigned lanes_asked = mask & all;
  if ((mask & ~all) != 0 && mask != 0xffffffffu)
    fail(thread, "mask with absent lanes in " + text(site));
  if (((mask >> (thread.index % kWarp)) & 1u) == 0) {
    fail(thread, "lane " + std::to_string(thread.index % kWarp) + " is not in its own mask in " +
                     text(site));
  }
  thread.state = State::kWarp;
  thread.site = site;
  thread.op = op;
  thread.mask = lanes_asked;
  thread.value = value;
  thread.source = source;
  uint64_t* sync = nullptr;
  if (op == WarpOp::kSync) {
    const unsigned kind = lanes_asked == all ? 0 : 1 + lanes_asked % (kSyncClasses - 1);
    sync = &block.sync.warp[warp][kind][thread.warp_syncs[kind]++ % 2];
    release(sync);
  }
  const unsigned wanted = static_cast<unsigned>(__builtin_popcount(lanes_asked));
  if (++block.waiting[warp] >= wanted) {
    std::vector<Thread*> lanes;
    lanes.reserve(wanted);
    for (int i = 0; i < kWarp; ++i) {
      if (((lanes_asked >> i) & 1u) == 0) continue;
      Thread* const other = block.threads[start + i].get();
      const bool here = other->state == State::kWarp && other->op == op &&
                        other->mask == lanes_asked && same(other->site, site);
      if (!here) break;
      lanes.push_back(other);
    }
    if (lanes.size() == wanted) {
      block.waiting[warp] -= wanted;
      complete(block, lanes, start);
    }
  }
  to_scheduler(thread);
  if (sync != nullptr) acquire(sync);
  return thread.value;
}

// A fence makes earlier writes part of what later atomics publish, and what earlier atomics have
// seen part of what later reads may rely on.
void fence() {
  Thread& thread = current_thread();
  thread.fenced = true;
  const int known = std::min(thread.atomics, kRememberedAtomics);
  for (int i = 0; i < known; ++i) acquire(thread.atomic_addresses[i]);
}

void before_atomic(void* address) {
  Thread& thread = current_thread();
  if (current_block().order == kRandom && (current_block().random() & 1u) != 0)
    to_scheduler(thread);
  if (thread.fenced) release(address);
}

void after_atomic(void* address) {
  Thread& thread = current_thread();
  thread.atomic_addresses[thread.atomics++ % kRememberedAtomics] = address;
}

}  // namespace came8bit_shim
