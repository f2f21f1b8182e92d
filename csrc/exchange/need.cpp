#include "exchange/need.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "box/cut.h"

namespace dcp_fast::exchange {

namespace {

constexpr size_t kWordBytes = sizeof(int64_t);
constexpr int64_t kMostDepth = 64 + 1;  // torch's own limit is 64 dimensions, and elements have bytes

size_t words_of(size_t bytes) { return (bytes + kWordBytes - 1) / kWordBytes; }

class Words {
 public:
  Words(const int64_t* words, size_t count) : next_(words), left_(count) {}

  const int64_t* take(size_t count) {
    if (count > left_) fail();
    left_ -= count;
    return std::exchange(next_, next_ + count);
  }
  int64_t next(int64_t least, int64_t most) {
    const int64_t value = *take(1);
    if (value < least || value > most) fail();
    return value;
  }
  // A number of things that take at least one word each.
  size_t next_count() { return static_cast<size_t>(next(0, static_cast<int64_t>(left_))); }
  bool done() const { return left_ == 0; }

  [[noreturn]] static void fail() { throw std::invalid_argument("another rank sent what is no list of its needs"); }

 private:
  const int64_t* next_;
  size_t left_;
};

}  // namespace

void Need::add(uint32_t file, int64_t begin, const box::Loops& loops, int32_t grain) {
  NeededBox box;
  box.file = file;
  box.loops = loops_.size();
  box.begin = begin;
  box.end = begin + box::source_span(loops);
  box.grain = grain;
  box.number = static_cast<uint32_t>(boxes_.size());
  // Neighbours are joined where the source alone goes on without a gap, from the innermost loop outwards.
  box::Loops joined;
  for (size_t i = loops.size(); i-- > 0;) {
    const box::Dim loop{loops[i].size, loops[i].source_stride, 0};
    if (!joined.empty() && loop.source_stride == joined.back().size * joined.back().source_stride) {
      joined.back().size *= loop.size;
    } else {
      joined.push_back(loop);
    }
  }
  box.depth = static_cast<uint32_t>(joined.size());
  loops_.insert(loops_.end(), joined.rbegin(), joined.rend());
  boxes_.push_back(box);
}

std::vector<int64_t> Need::encode() const {
  std::vector<bool> has_boxes(files_.size(), false);
  for (const NeededBox& box : boxes_) has_boxes.at(box.file) = true;
  std::vector<int64_t> numbers(files_.size(), 0);  // of each file among those that have boxes
  std::vector<int64_t> words = {std::count(has_boxes.begin(), has_boxes.end(), true),
                                static_cast<int64_t>(boxes_.size()), static_cast<int64_t>(loops_.size())};
  for (size_t i = 0, count = 0; i < files_.size(); ++i) {
    if (!has_boxes[i]) continue;
    numbers[i] = static_cast<int64_t>(count++);
    const NeededFile& file = files_[i];
    words.insert(words.end(), {file.size, file.version, static_cast<int64_t>(file.name.size())});
    const size_t begin = words.size();
    words.resize(begin + words_of(file.name.size()), 0);
    if (!file.name.empty()) std::memcpy(&words[begin], file.name.data(), file.name.size());
  }
  for (const NeededBox& box : boxes_) words.insert(words.end(), {numbers[box.file], box.depth, box.begin, box.grain});
  for (const box::Dim& loop : loops_) words.insert(words.end(), {loop.size, loop.source_stride});
  return words;
}

Need Need::decode(const int64_t* words, size_t count) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  Words rest(words, count);
  const size_t file_count = rest.next_count();
  const size_t box_count = rest.next_count();
  const size_t loop_count = rest.next_count();
  std::vector<NeededFile> files(file_count);
  for (NeededFile& file : files) {
    file.size = rest.next(0, kMost);
    file.version = *rest.take(1);
    const auto length = static_cast<size_t>(rest.next(0, std::numeric_limits<int32_t>::max()));
    const int64_t* name = rest.take(words_of(length));
    file.name.assign(reinterpret_cast<const char*>(name), length);
  }
  Need need(std::move(files));
  need.boxes_.resize(box_count);
  size_t loops = 0;
  for (size_t i = 0; i < box_count; ++i) {
    NeededBox& box = need.boxes_[i];
    if (file_count == 0) Words::fail();
    box.file = static_cast<uint32_t>(rest.next(0, static_cast<int64_t>(file_count) - 1));
    box.depth = static_cast<uint32_t>(rest.next(1, kMostDepth));
    box.begin = rest.next(0, kMost);
    box.grain = static_cast<int32_t>(rest.next(1, kMostGrain));
    box.number = static_cast<uint32_t>(i);
    box.loops = loops;
    loops += box.depth;
  }
  if (loops != loop_count) Words::fail();
  need.loops_.resize(loop_count);
  for (box::Dim& loop : need.loops_) {
    loop.size = rest.next(1, kMost);
    loop.source_stride = rest.next(1, kMost);
  }
  if (!rest.done()) Words::fail();
  for (NeededBox& box : need.boxes_) {
    // From the innermost loop outwards: the span, which must lie in the file, and each loop's steps apart.
    int64_t last = 0;
    for (size_t i = box.loops + box.depth; i-- > box.loops;) {
      const box::Dim& loop = need.loops_[i];
      const bool is_innermost = i + 1 == box.loops + box.depth;
      int64_t step = 0;
      if (loop.source_stride <= last || (is_innermost && loop.source_stride != 1) ||
          __builtin_mul_overflow(loop.size - 1, loop.source_stride, &step) ||
          __builtin_add_overflow(last, step, &last)) {
        Words::fail();
      }
    }
    const int64_t size = need.files_[box.file].size;
    if (box.begin >= size || last >= size - box.begin) Words::fail();
    box.end = box.begin + last + 1;
  }
  return need;
}

void Need::number_files(const std::vector<uint32_t>& numbers) {
  for (NeededBox& box : boxes_) box.file = numbers.at(box.file);
  std::sort(boxes_.begin(), boxes_.end(), [](const NeededBox& a, const NeededBox& b) {
    return std::tie(a.file, a.begin, a.number) < std::tie(b.file, b.begin, b.number);
  });
  reach_.clear();
  for (const NeededBox& box : boxes_) add_reach(box);
}

void Need::append(const Need& other, NeededBox box) {
  const box::Dim* loops = other.loops(box);
  box.loops = loops_.size();
  loops_.insert(loops_.end(), loops, loops + box.depth);
  add_reach(box);
  boxes_.push_back(box);
}

void Need::add_reach(const NeededBox& box) {
  const bool is_first = reach_.empty() || boxes_[reach_.size() - 1].file != box.file;
  reach_.push_back(is_first ? box.end : std::max(box.end, reach_.back()));
}

size_t Need::first_within(uint32_t file, int64_t begin) const {
  // Within a file the reach ascends.
  size_t low = 0;
  size_t high = boxes_.size();
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    if (boxes_[middle].file < file || (boxes_[middle].file == file && reach_[middle] <= begin)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

int64_t Need::bytes_within(const NeededBox& box, int64_t begin, int64_t end) const {
  const box::Dim* of_box = loops(box);
  return box::volume_before(of_box, box.depth, end - box.begin) -
         box::volume_before(of_box, box.depth, begin - box.begin);
}

}  // namespace dcp_fast::exchange
