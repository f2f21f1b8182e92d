#include "transfer/node.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "io/text_file.h"
#include "transfer/control_groups.h"

namespace dcp_fast::transfer {

namespace {

constexpr int64_t kMostRanks = 4096;

int64_t variable(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nobody sets it meanwhile
  return text != nullptr ? std::strtol(text, nullptr, 10) : otherwise;
}

// The number behind a word at the beginning of a line; 0 if there is none.
int64_t number_behind(const std::string& text, std::string_view word) {
  for (size_t begin = 0; begin < text.size();) {
    if (text.compare(begin, word.size(), word) == 0) return std::strtoll(&text[begin + word.size()], nullptr, 10);
    begin = std::min(text.find('\n', begin), text.size() - 1) + 1;
  }
  return 0;
}

// What a group leaves the page cache, with what it holds of it already.
int64_t room_of(const std::string& folder) {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  std::string limit = io::read_text(folder + "/memory.max");  // version 2; "max" without a limit
  std::string used = io::read_text(folder + "/memory.current");
  const std::string stat = io::read_text(folder + "/memory.stat");
  std::string prefix;
  if (limit.empty()) {
    limit = io::read_text(folder + "/memory.limit_in_bytes");  // version 1; a huge number without a limit
    used = io::read_text(folder + "/memory.usage_in_bytes");
    prefix = "total_";
  }
  const int64_t most = std::strtoll(limit.c_str(), nullptr, 10);
  if (most <= 0) return kNoLimit;
  const int64_t cached = number_behind(stat, prefix + "inactive_file ") + number_behind(stat, prefix + "active_file ");
  return std::max<int64_t>(most - std::max<int64_t>(std::strtoll(used.c_str(), nullptr, 10) - cached, 0), 0);
}

}  // namespace

Node node_of_this_process() {
  Node node;
  node.ranks = static_cast<int>(std::clamp<int64_t>(variable("LOCAL_WORLD_SIZE", 1), 1, kMostRanks));
  node.rank = static_cast<int>(std::clamp<int64_t>(variable("LOCAL_RANK", 0), 0, node.ranks - 1));
  return node;
}

bool shares_page_cache(const Node& node, double bytes, double bytes_stored, int64_t room) {
  // So little may be small tensors of which each rank has a copy, and ranks with a little more than others.
  constexpr double kFew = 1.1;
  const double bytes_of_all = bytes * node.ranks;
  const bool overlap = node.ranks > 1 && bytes_of_all > kFew * bytes_stored;
  return overlap && std::min(bytes_of_all, bytes_stored) <= static_cast<double>(room);
}

int64_t room_for_page_cache(const std::string& root) {
  constexpr int64_t kKilobyte = 1024;
  int64_t room = kKilobyte * number_behind(io::read_text(root + "/proc/meminfo"), "MemAvailable:");
  for_each_control_group(root, "memory", [&](const std::string& folder) { room = std::min(room, room_of(folder)); });
  return room;
}

}  // namespace dcp_fast::transfer
