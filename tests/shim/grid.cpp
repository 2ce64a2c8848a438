// Runs a grid: blocks on OS threads, several at a time; and what tests set and ask.
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "block.h"

namespace came8bit_shim {
namespace {

struct Settings {
  int64_t l2_bytes = 1 << 20;
  int64_t workers = 2;  // blocks at a time
  int64_t order = kForward;
  int64_t seed = 0;
  int64_t garbage = 0xff;       // byte that shared memory is full of when a block starts
  int64_t head = 0;             // blocks from the beginning of each grid that are run,
  int64_t tail = INT64_MAX;     // and from its end,
  int64_t whole = 0;            // but grids of up to so many blocks are run as a whole
  int64_t large_arguments = 1;  // whether kernels may take more than 4 KB of them
};
Settings settings;

struct Launch {
  int64_t blocks, threads, at_once;
  int64_t kernel;  // its offset in the library
};
std::vector<Launch> launches;

// The shared memory of this OS thread: the thread-local storage of this library.
struct Storage {
  char* begin = nullptr;
  size_t size = 0;
};

int find_storage(dl_phdr_info* info, size_t, void* result) {
  const uintptr_t own = reinterpret_cast<uintptr_t>(&find_storage);
  Storage found;
  bool is_this = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && own >= begin && own < begin + header.p_memsz) is_this = true;
    if (header.p_type == PT_TLS) {
      found = {static_cast<char*>(info->dlpi_tls_data), header.p_memsz};
    }
  }
  if (is_this) *static_cast<Storage*>(result) = found;
  return is_this;
}

void fill_shared_memory(const Storage& storage) {
  char* const own = reinterpret_cast<char*>(&thread_state);
  const int byte = static_cast<int>(settings.garbage);
  memset(storage.begin, byte, static_cast<size_t>(own - storage.begin));
  char* const after = own + sizeof thread_state;
  memset(after, byte, static_cast<size_t>(storage.begin + storage.size - after));
}

struct Grid {
  unsigned blocks, threads;
  void (*body)(void*);
  void* closure;
  std::vector<unsigned> order;  // of the blocks that are run
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::atomic<int64_t> running{0}, most_running{0};
  std::mutex mutex;
  std::condition_variable all_started;
  unsigned started = 0, workers = 0;
  std::string error;
};

std::vector<std::unique_ptr<Block>> slots;  // one per worker, with its stacks
std::mutex one_grid_at_a_time;

void wait_for_the_others(Grid& grid) {
  std::unique_lock<std::mutex> lock(grid.mutex);
  if (++grid.started == grid.workers) {
    grid.all_started.notify_all();
  } else {
    grid.all_started.wait(lock, [&] { return grid.started == grid.workers; });
  }
}

void work(Grid& grid, std::unique_ptr<Block>& slot) {
  std::fesetenv(FE_DFL_ENV);  // subnormals as on a GPU, whatever the caller has set
  thread_state = {};
  Storage storage;
  dl_iterate_phdr(find_storage, &storage);
  // The first block of each worker is under way before any of them goes on.
  bool first = true;
  for (size_t i; (i = grid.next.fetch_add(1)) < grid.order.size() && !grid.failed;) {
    if (slot == nullptr) slot = std::make_unique<Block>();
    Block& block = *slot;
    const unsigned index = grid.order[i];
    const int64_t running = grid.running.fetch_add(1) + 1;
    int64_t most = grid.most_running.load();
    while (running > most && !grid.most_running.compare_exchange_weak(most, running)) {
    }
    if (first) wait_for_the_others(grid);
    first = false;
    block.body = grid.body;
    block.closure = grid.closure;
    block.error.clear();
    block.random.seed(static_cast<uint64_t>(settings.seed) * 1000003u + index);
    block.order = static_cast<Order>(settings.order);
    thread_state.block = &block;
    block.prepare(grid.threads,
                  {{0, 0, 0}, {index, 0, 0}, {grid.threads, 1, 1}, {grid.blocks, 1, 1}});
    block.scheduler.adopt_thread();
    fill_shared_memory(storage);
    release(&block.sync.begin);
    block.run();
    acquire(&block.sync.end);
    grid.running.fetch_sub(1);
    if (!block.error.empty()) {
      std::lock_guard<std::mutex> lock(grid.mutex);
      if (grid.error.empty()) {
        grid.error = "block " + std::to_string(index) + " of " + std::to_string(grid.blocks) +
                     ": " + block.error;
      }
      grid.failed = true;
      slot.reset();  // with the fibers that did not come to their end
      break;
    }
  }
  if (first) wait_for_the_others(grid);
}

}  // namespace

int64_t l2_bytes() {
  return settings.l2_bytes;
}
bool large_arguments() {
  return settings.large_arguments != 0;
}

void run(const void* kernel, unsigned blocks, unsigned threads, void (*body)(void*),
         void* closure) {
  if (blocks == 0 || blocks > INT32_MAX || threads == 0 || threads > kMaxThreads) {
    throw std::runtime_error("came8bit shim: a GPU refuses a launch of " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads");
  }
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  Grid grid;
  grid.blocks = blocks;
  grid.threads = threads;
  grid.body = body;
  grid.closure = closure;
  for (int64_t i = 0; i < blocks; ++i) {
    if (blocks > settings.whole && i >= settings.head && i < blocks - settings.tail) {
      i = blocks - settings.tail - 1;
    } else {
      grid.order.push_back(static_cast<unsigned>(i));
    }
  }
  if (settings.order == kBackward) std::reverse(grid.order.begin(), grid.order.end());
  if (settings.order == kRandom) {
    std::mt19937_64 random(static_cast<uint64_t>(settings.seed));
    std::shuffle(grid.order.begin(), grid.order.end(), random);
  }
  grid.workers = static_cast<unsigned>(
      std::min<size_t>(static_cast<size_t>(settings.workers), grid.order.size()));
  if (slots.size() < grid.workers) slots.resize(grid.workers);
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < grid.workers; ++i) {
    workers.emplace_back([&grid, i] { work(grid, slots[i]); });
  }
  for (std::thread& worker : workers) worker.join();
  Dl_info library;
  dladdr(kernel, &library);
  launches.push_back({blocks, threads, grid.most_running.load(),
                      static_cast<const char*>(kernel) - static_cast<char*>(library.dli_fbase)});
  if (!grid.error.empty()) throw std::runtime_error("came8bit shim: " + grid.error);
}

}  // namespace came8bit_shim

// --- what tests call ---------------------------------------------------------------------------

#define CAME8BIT_EXPORT extern "C" __attribute__((visibility("default")))

// Values in the order of Settings; returns 0, or -1 where one makes no sense and nothing is
// changed.
CAME8BIT_EXPORT int came8bit_shim_configure(const int64_t* values, int count) {
  using namespace came8bit_shim;
  constexpr int kSettings = 9;
  static_assert(sizeof(Settings) == kSettings * sizeof(int64_t), "all of them");
  Settings fresh;
  if (count != kSettings) return -1;
  memcpy(static_cast<void*>(&fresh), values, sizeof fresh);
  if (fresh.l2_bytes < 1 || fresh.workers < 1 || fresh.workers > 64 || fresh.order < kForward ||
      fresh.order > kRandom || fresh.garbage < 0 || fresh.garbage > 255 || fresh.head < 0 ||
      fresh.tail < 0 || fresh.whole < 0 || (fresh.large_arguments & ~1) != 0) {
    return -1;
  }
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  settings = fresh;
  return 0;
}

// Writes the members of up to `capacity` launches since the last call and forgets them; returns how
// many there were.
CAME8BIT_EXPORT int64_t came8bit_shim_launches(int64_t* out, int64_t capacity) {
  using namespace came8bit_shim;
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  const int64_t count = static_cast<int64_t>(launches.size());
  for (int64_t i = 0; i < std::min(count, capacity); ++i)
    memcpy(out + 4 * i, &launches[i], sizeof(Launch));
  launches.clear();
  return count;
}
