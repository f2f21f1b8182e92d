#include "io/text_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>

namespace dcp_fast::io {

namespace {
constexpr size_t kMostBytes = 64 << 10;
}

std::string read_text(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  std::string text;
  std::array<char, 4096> part{};
  while (text.size() < kMostBytes) {
    const ssize_t size = ::read(fd, part.data(), part.size());
    if (size < 0 && errno == EINTR) continue;
    if (size <= 0) break;
    text.append(part.data(), static_cast<size_t>(size));
  }
  ::close(fd);
  return text;
}

}  // namespace dcp_fast::io
