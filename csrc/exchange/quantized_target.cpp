#include "exchange/quantized_target.h"

#include <algorithm>

#include "transfer/workers.h"

namespace dcp_fast::exchange {

box::Loops QuantizedTarget::loops(int64_t stored_row_bytes) const {
  const box::Dim row{row_bytes, 1, 1};
  if (box.rows == 1) return {row};
  return {{box.rows, stored_row_bytes, row_bytes}, row};
}

copy::QuantizedBox QuantizedTarget::piece(const box::Part& part, const std::byte* from) const {
  const int64_t row = part.destination / row_bytes;
  const int64_t unit = part.destination % row_bytes / unit_bytes;
  copy::QuantizedBox piece = box;
  piece.rows = part.loops.size() == 1 ? 1 : part.loops.front().size;
  piece.from = from;
  piece.from_stride = part.loops.back().size;
  // Columns count from the first element of the box. The first unit may have others before that.
  const int64_t before = unit_columns == 1 ? 0 : box.first_column;
  const int64_t begin = std::max(unit * unit_columns - before, int64_t{0});
  const int64_t end = std::min((unit + piece.from_stride / unit_bytes) * unit_columns - before, box.columns);
  piece.columns = end - begin;
  // From the block of the box's first element.
  const int64_t first_row = box.first_row + row;
  const int64_t first_column = box.first_column + begin;
  const int64_t scale = first_row / box.block_rows * box.scales_stride + first_column / box.block_columns;
  piece.scales = box.scales + scale * copy::bytes_of(how.scales);
  piece.first_row = first_row % box.block_rows;
  piece.first_column = first_column % box.block_columns;
  piece.to = box.to + row * box.to_row_stride + begin * box.to_column_stride;
  return piece;
}

void QuantizedPieces::add(const QuantizedTarget& target, const box::Part& part, const std::byte* from) {
  pieces_.push_back({&target.how, target.piece(part, from)});
  bytes_ += box::volume(part.loops);
}

int64_t QuantizedPieces::place(int threads, const std::function<bool()>& interrupted) const {
  if (pieces_.empty()) return 0;
  io::IoCounters counters;  // nothing is read
  transfer::run_parallel(pieces_.size(), threads, counters, interrupted, [this](size_t piece, transfer::Worker&) {
    copy::dequantize(*pieces_[piece].how, pieces_[piece].box);
  });
  return bytes_;
}

}  // namespace dcp_fast::exchange
