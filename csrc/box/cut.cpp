#include "box/cut.h"

#include <algorithm>

namespace dcp_fast::box {

namespace {

int64_t span_of(const Dim* loops, size_t depth) {
  int64_t last = 0;
  for (size_t i = 0; i < depth; ++i) last += (loops[i].size - 1) * loops[i].source_stride;
  return last + 1;
}

int64_t volume_of(const Dim* loops, size_t depth) {
  int64_t bytes = 1;
  for (size_t i = 0; i < depth; ++i) bytes *= loops[i].size;
  return bytes;
}

class Cutter {
 public:
  explicit Cutter(std::vector<Part>& parts) : parts_(parts) {}

  // `source` and `destination`: of the loops' first byte, from the box's. [begin, end) counts from that byte.
  void cut(const Dim* loops, size_t depth, int64_t source, int64_t destination, int64_t begin, int64_t end) {
    const int64_t span = span_of(loops, depth);
    if (begin <= 0 && end >= span) return add(Loops(loops, loops + depth), source, destination);
    if (end <= 0 || begin >= span) return;
    if (depth == 1) {
      const int64_t first = std::max<int64_t>(begin, 0);
      return add({{std::min(end, span) - first, 1, 1}}, source + first, destination + first);
    }
    const Dim& outer = loops[0];
    const int64_t stride = outer.source_stride;
    const int64_t inner = span_of(loops + 1, depth - 1);
    const auto step = [&](int64_t i) {
      cut(loops + 1, depth - 1, source + i * stride, destination + i * outer.destination_stride, begin - i * stride,
          end - i * stride);
    };
    // Steps in [first, last) touch the interval, and those in [whole, whole_end) lie in it.
    const int64_t first = begin < inner ? 0 : (begin - inner) / stride + 1;
    const int64_t last = std::min(outer.size, (end - 1) / stride + 1);
    if (first >= last) return;
    const int64_t whole = first * stride >= begin ? first : first + 1;
    const int64_t whole_end = (last - 1) * stride + inner <= end ? last : last - 1;
    if (whole > first) step(first);
    if (whole < whole_end) {
      Loops middle(loops, loops + depth);
      middle[0].size = whole_end - whole;
      if (middle[0].size == 1) middle.erase(middle.begin());
      add(std::move(middle), source + whole * stride, destination + whole * outer.destination_stride);
    }
    if (whole_end < last && last - 1 >= whole) step(last - 1);
  }

 private:
  void add(Loops loops, int64_t source, int64_t destination) {
    const int64_t bytes = volume(loops);
    parts_.push_back({std::move(loops), source, destination, packed_});
    packed_ += bytes;
  }

  std::vector<Part>& parts_;
  int64_t packed_ = 0;
};

}  // namespace

int64_t volume_before(const Dim* loops, size_t depth, int64_t position) {
  int64_t bytes = 0;
  for (; depth > 0 && position > 0; ++loops, --depth) {
    const int64_t inner = volume_of(loops + 1, depth - 1);
    const int64_t steps = std::min(loops->size, position / loops->source_stride);
    bytes += steps * inner;
    if (steps == loops->size) break;
    position -= steps * loops->source_stride;
  }
  return bytes;
}

std::vector<Part> cut(const Dim* loops, size_t depth, int64_t begin, int64_t end) {
  std::vector<Part> parts;
  if (depth > 0 && begin < end) Cutter(parts).cut(loops, depth, 0, 0, begin, end);
  return parts;
}

}  // namespace dcp_fast::box
