// How good the launches of box_copy_test.cpp are: they have to tell the shipped kernel from nearly all of its mutants.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <optional>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "box_copy_launch.h"
#include "doctest/doctest.h"
#include "mutants.h"
#include "ptx/interpreter.h"
#include "random.h"

using namespace simcuda::testing;
using dcp_fast::testing::Random;
using simcuda::ptx::Module;

namespace {

// No thread of these launches needs a tenth of it.
constexpr uint64_t kStepsPerThread = 100'000;

// All mutants take minutes in a build that is not optimised.
#ifdef __OPTIMIZE__
constexpr size_t kEvery = 1;
#else
constexpr size_t kEvery = 20;
#endif

// Mutants that do what the original does, as long as slots are what box_copy.h says they are. The pattern is searched
// for in
// "<before> -> <after>".
struct Equivalent {
  const char* pattern;
  const char* reason;
};

constexpr Equivalent kEquivalents[] = {
    {R"((setp\.ge|setp\.lt|min)\.u32 .* -> \1\.s32 )", "counts of vectors and entries are below 2^31"},
    {R"((mul\.wide)\.u32 .*, (2|4|8|16|32); -> \1\.s32 )",
     "so are indices of dimensions, entries, and vectors of 2 bytes or more in a slot of at most 4 GiB"},
    {R"((cvt\.u64\.u32|div\.u32) (.*) -> (cvt\.s64\.s32|div\.s32) \2)",
     "likewise. Indices of vectors of 1 byte reach 2^32, and mutants where that matters are killed"},
    {R"(mov\.u64 (%rd\d+), (%rd\d+); -> mov\.u64 \1, )", "all offsets of a batch begin with the same zero"},
    {R"(mov\.u64 %rd\d+, 0; -> $)", "set to zero for the second time"},
    {R"(setp\.ne\.s32 (%p\d+), %r\d+, 0; -> setp\.ne\.s32 \1, (%r\d+, 0|%r\d+, -1);)",
     "the loop over dimensions may end when no index is left, or include the outermost one: the rest is zero"},
    {R"(add\.s32 (%r\d+), %r\d+, (%r\d+); -> add\.s32 \1, %r\d+, \2;)",
     "from a position past the entry's end, or from its last vector, one goes to a position past the end"},
    {R"(cvt\.u64\.u32 (%rd\d+), %r\d+; -> cvt\.u64\.u32 \1, )", "the other register holds the same index"},
    {R"(@%p\d+ bra \$L__BB0_(\d+); -> @%p\d+ bra )",
     "both labels lead to the same end, or are for vector sizes that do not exist"},
    {R"((shf\.l\.wrap\.b32 .*, 31;|setp\.(gt|eq|ne)\.s32 .*, [012];) -> )",
     "the search for the vector's size takes other turns to the same end"},
};

const char* reason_of(const Mutant& mutant) {
  static const std::regex kBlanks("[\\s]+");
  const std::string change = std::regex_replace(mutant.before + " -> " + mutant.after, kBlanks, " ");
  for (const Equivalent& equivalent : kEquivalents) {
    if (std::regex_search(change, std::regex(equivalent.pattern))) return equivalent.reason;
  }
  return nullptr;
}

std::optional<Module> parse(const std::string& text) {
  try {
    return Module(text);
  } catch (const std::runtime_error&) {
    return std::nullopt;  // no instruction, so no mutant of one
  }
}

// The launches that come by each line: no other one can notice what is done to it.
class LaunchesByLine {
 public:
  LaunchesByLine(const std::string& ptx, std::vector<Launch> launches) : launches_(std::move(launches)) {
    for (const Launch& launch : launches_) {
      const Module module(ptx);
      REQUIRE(failure_of(module.kernel(kBoxCopyName), launch, kStepsPerThread) == "");
      never_executed_.push_back(module.kernel(kBoxCopyName).coverage().lines_never_executed);
    }
  }

  bool kill(const Module& module, int line) const {
    for (size_t i = 0; i < launches_.size(); ++i) {
      // A guarded instruction that is never executed is reached nevertheless, if the line before is.
      if (!executes(i, line) && !executes(i, line - 1)) continue;
      if (!failure_of(module.kernel(kBoxCopyName), launches_[i], kStepsPerThread).empty()) return true;
    }
    return false;
  }

 private:
  bool executes(size_t launch, int line) const {
    return !std::binary_search(never_executed_[launch].begin(), never_executed_[launch].end(), line);
  }

  std::vector<Launch> launches_;
  std::vector<std::vector<int>> never_executed_;
};

}  // namespace

TEST_CASE("box copy kernel: mutants") {
  Random random(4);
  std::vector<Launch> launches = plain_launches(random);
  for (const Launch& launch : sparse_launches(random)) launches.push_back(launch);
  for (int i = 0; i < 20; ++i) launches.push_back(random_launch(random));
  const std::string original = box_copy_ptx();
  const LaunchesByLine by_line(original, std::move(launches));
  const std::vector<Mutant> mutants = mutants_of(original);
  size_t total = 0;
  size_t killed = 0;
  size_t equivalent = 0;
  for (size_t i = 0; i < mutants.size(); i += kEvery) {
    const std::optional<Module> module = parse(mutated(mutants[i], original));
    if (!module) continue;
    ++total;
    if (by_line.kill(*module, mutants[i].line)) {
      ++killed;
    } else if (reason_of(mutants[i]) != nullptr) {
      ++equivalent;
    } else {
      std::cout << "survivor in line " << mutants[i].line << ":" << mutants[i].before << "  ->" << mutants[i].after
                << "\n";
    }
  }
  std::cout << total << " mutants of the kernel: " << killed << " killed, " << equivalent << " equivalent\n";
  CHECK(total * kEvery > 4000);
  // The survivors that are left: the number of entries cut to 16 bits, for which these launches are too small (that one
  // test of box_copy_test.cpp is not), and a branch that only a vector size which does not exist would take.
  CHECK(killed * 100 >= total * 90);
  CHECK((killed + equivalent) * 1000 >= total * 995);
}
