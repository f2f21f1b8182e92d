// Boxes of quantized elements, which are dequantized as they arrive. Their scales are in memory by then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "box/cut.h"
#include "copy/dequantize.h"

namespace dcp_fast::exchange {

// Where the elements of a box of two dimensions go. What is stored of it are rows of units: elements, or blocks of
// MXFP4.
struct QuantizedTarget {
  copy::Dequantization how;
  copy::QuantizedBox box;    // all of it, but for where its elements lie
  int64_t row_bytes = 0;     // of the box, as it is stored
  int64_t unit_bytes = 1;    // no row is cut within a unit
  int64_t unit_columns = 1;  // elements of a unit

  // The loops of the box in a file whose rows have `stored_row_bytes`. Their destinations count bytes of the box.
  box::Loops loops(int64_t stored_row_bytes) const;

  // What is to be dequantized of a part of these loops, whose bytes lie one after another from `from` on.
  copy::QuantizedBox piece(const box::Part& part, const std::byte* from) const;
};

// What is to be dequantized of one round.
class QuantizedPieces {
 public:
  void add(const QuantizedTarget& target, const box::Part& part, const std::byte* from);

  // Returns how many stored bytes there were. Throws Interrupted.
  int64_t place(int threads, const std::function<bool()>& interrupted) const;

 private:
  struct Piece {
    const copy::Dequantization* how;
    copy::QuantizedBox box;
  };
  std::vector<Piece> pieces_;
  int64_t bytes_ = 0;
};

}  // namespace dcp_fast::exchange
