// The limit of a warm load: the wanted boxes of files in the page cache, copied into their destinations with no
// checkpoint logic at all. `memory.py` builds this and calls it; one call is one load in one setting.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// As `memory.py` has it. All is in bytes.
struct Box {
  int64_t file;
  int64_t offset;
  int64_t rows;
  int64_t row_bytes;
  int64_t stride;  // from row to row in the file
  char* destination;
  int64_t step;  // from row to row in the destination
};

struct Setting {
  int64_t mapped;  // 0: pread
  int64_t block_bytes;
  int64_t threads;
  int64_t to_bfloat16;  // boxes are float32, destinations bfloat16
};

constexpr int64_t kPage = 4096;
constexpr int64_t kRowsAtOnce = 512;       // two vectors each, of the 1,024 that a call takes
constexpr int64_t kConverted = 256 << 10;  // that pread brings at once where it is converted: it stays in the cache
constexpr int64_t kFloatsAtOnce = 1024;    // the converted ones stay in the nearest cache

#if defined(__x86_64__)

// Stores that go past the caches do not read the line that they replace.
__attribute__((target("avx2"))) void stream_avx2(char* to, const char* from, size_t vectors) {
  for (size_t i = 0; i < vectors; ++i) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 64 * i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 64 * i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 64 * i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 64 * i + 32), high);
  }
}

void stream_sse2(char* to, const char* from, size_t vectors) {
  for (size_t i = 0; i < 4 * vectors; ++i) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 16 * i), value);
  }
}

void stream(char* to, const char* from, size_t size) {
  static const bool avx2 = __builtin_cpu_supports("avx2") != 0;
  const size_t head = std::min(size, (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64);
  std::memcpy(to, from, head);
  const size_t vectors = (size - head) / 64;
  (avx2 ? stream_avx2 : stream_sse2)(to + head, from + head, vectors);
  const size_t done = head + 64 * vectors;
  std::memcpy(to + done, from + done, size - done);
}

void finish_streams() { _mm_sfence(); }

#define MANY_VERSIONS __attribute__((target_clones("avx2", "default")))

#else

void stream(char* to, const char* from, size_t size) { std::memcpy(to, from, size); }
void finish_streams() {}
#define MANY_VERSIONS

#endif

// To the nearest value, ties to even, as torch does.
MANY_VERSIONS void convert_some(uint16_t* to, const char* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, from + 4 * i, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
  }
}

void convert(char* to, const char* from, int64_t bytes) {
  alignas(64) uint16_t some[kFloatsAtOnce];
  for (int64_t count = 0; bytes > 0; bytes -= 4 * count, from += 4 * count, to += 2 * count) {
    count = std::min(kFloatsAtOnce, bytes / 4);
    convert_some(some, from, count);
    stream(to, reinterpret_cast<const char*>(some), 2 * static_cast<size_t>(count));
  }
}

// Throws errno.
void check(bool ok) {
  if (!ok) throw errno != 0 ? errno : EIO;
}

void read_fully(int fd, std::vector<iovec>& vectors, int64_t offset) {
  for (size_t first = 0; first < vectors.size();) {
    ssize_t got = ::preadv(fd, &vectors[first], static_cast<int>(vectors.size() - first), offset);
    errno = got == 0 ? EIO : errno;
    check(got > 0);
    offset += got;
    for (; first < vectors.size() && got >= static_cast<ssize_t>(vectors[first].iov_len); ++first) {
      got -= static_cast<ssize_t>(vectors[first].iov_len);
    }
    if (got == 0) continue;
    vectors[first].iov_base = static_cast<char*>(vectors[first].iov_base) + got;
    vectors[first].iov_len -= static_cast<size_t>(got);
  }
}

void place(const Setting& setting, const Box& box, int64_t row, const char* from) {
  char* to = box.destination + row * box.step;
  if (setting.to_bfloat16 != 0) {
    convert(to, from, box.row_bytes);
  } else {
    stream(to, from, static_cast<size_t>(box.row_bytes));
  }
}

// Has the system find memory for a destination that was never touched, which is faster than a fault for each page.
void populate(const Setting& setting, const Box& box) {
#ifdef MADV_POPULATE_WRITE
  const int64_t written = setting.to_bfloat16 != 0 ? box.row_bytes / 2 : box.row_bytes;
  if (box.rows > 1 && box.step != written) return;
  const auto lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(box.destination) % kPage);
  const int64_t size = lead + box.rows * written;
  char* pages = box.destination - lead;
  unsigned char is_there = 1;
  if (::mincore(pages + size / 2 / kPage * kPage, kPage, &is_there) != 0 || (is_there & 1) != 0) return;
  ::madvise(pages, static_cast<size_t>(size), MADV_POPULATE_WRITE);
#endif
}

void copy_mapped(const Setting& setting, const Box& box, int fd) {
  const int64_t begin = box.offset / kPage * kPage;
  const int64_t end = box.offset + (box.rows - 1) * box.stride + box.row_bytes;
  const auto size = static_cast<size_t>(end - begin);
  void* mapped = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, begin);
  check(mapped != MAP_FAILED);
  const char* from = static_cast<const char*>(mapped) + (box.offset - begin);
  for (int64_t row = 0; row < box.rows; ++row) place(setting, box, row, from + row * box.stride);
  ::munmap(mapped, size);
}

void read_converted(const Box& box, int fd, std::vector<char>& buffer) {
  buffer.resize(kConverted);
  for (int64_t row = 0; row < box.rows; ++row) {
    for (int64_t done = 0; done < box.row_bytes; done += kConverted) {
      const int64_t size = std::min(kConverted, box.row_bytes - done);
      std::vector<iovec> vectors{{buffer.data(), static_cast<size_t>(size)}};
      read_fully(fd, vectors, box.offset + row * box.stride + done);
      convert(box.destination + row * box.step + done / 2, buffer.data(), size);
    }
  }
}

// Gaps between rows are read too, into a buffer that nobody looks at: that is faster than a call for each row.
void read_through(const Box& box, int fd, std::vector<char>& gap) {
  const auto gap_bytes = static_cast<size_t>(box.stride - box.row_bytes);
  if (box.rows > 1) gap.resize(std::max(gap.size(), gap_bytes));
  std::vector<iovec> vectors;
  for (int64_t first = 0; first < box.rows; first += kRowsAtOnce) {
    vectors.clear();
    const int64_t last = std::min(first + kRowsAtOnce, box.rows);
    for (int64_t row = first; row < last; ++row) {
      vectors.push_back({box.destination + row * box.step, static_cast<size_t>(box.row_bytes)});
      if (row + 1 < last && gap_bytes > 0) vectors.push_back({gap.data(), gap_bytes});
    }
    read_fully(fd, vectors, box.offset + first * box.stride);
  }
}

// Cuts boxes into parts of about a block.
std::vector<Box> parts_of(const Box* boxes, int64_t count, const Setting& setting) {
  std::vector<Box> parts;
  const int64_t shrinks = setting.to_bfloat16 != 0 ? 2 : 1;
  for (const Box* box = boxes; box != boxes + count; ++box) {
    Box part = *box;
    if (box->rows == 1) {
      for (int64_t done = 0; done < box->row_bytes; done += setting.block_bytes) {
        part.offset = box->offset + done;
        part.destination = box->destination + done / shrinks;
        part.row_bytes = std::min(setting.block_bytes, box->row_bytes - done);
        parts.push_back(part);
      }
      continue;
    }
    const int64_t rows = std::max<int64_t>(1, setting.block_bytes / box->stride);
    for (int64_t row = 0; row < box->rows; row += rows) {
      part.offset = box->offset + row * box->stride;
      part.destination = box->destination + row * box->step;
      part.rows = std::min(rows, box->rows - row);
      parts.push_back(part);
    }
  }
  return parts;
}

}  // namespace

// Copies all boxes. Returns the seconds that it took once all threads were there, or -errno.
extern "C" double copy_boxes(const int32_t* fds, const Box* boxes, int64_t count, const Setting* wanted) {
  const Setting setting = *wanted;
  const std::vector<Box> parts = parts_of(boxes, count, setting);
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  std::mutex mutex;
  std::condition_variable changed;
  int64_t waiting = 0;
  bool begun = false;
  const auto work = [&] {
    {
      std::unique_lock<std::mutex> lock(mutex);
      ++waiting;
      changed.notify_all();
      changed.wait(lock, [&] { return begun; });
    }
    std::vector<char> buffer;
    try {
      for (size_t i = next++; i < parts.size() && error == 0; i = next++) {
        const int fd = fds[parts[i].file];
        populate(setting, parts[i]);
        if (setting.mapped != 0) {
          copy_mapped(setting, parts[i], fd);
        } else if (setting.to_bfloat16 != 0) {
          read_converted(parts[i], fd, buffer);
        } else {
          read_through(parts[i], fd, buffer);
        }
      }
    } catch (int number) {
      error = number;
    }
    finish_streams();
  };
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < setting.threads; ++i) threads.emplace_back(work);
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return waiting == setting.threads; });
  const auto start = std::chrono::steady_clock::now();
  begun = true;
  lock.unlock();
  changed.notify_all();
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return error != 0 ? -static_cast<double>(error) : seconds;
}
