// On a real driver the primary contexts live as long as the run, as they do under torch. To make one takes a good part
// of a second, and hundreds of tests would each make it anew. On the simulator they come and go, which finds what is
// left in them.
#include <memory>
#include <vector>

#include "cuda/resources.h"
#include "doctest/doctest.h"
#include "test_device.h"

namespace dcp_fast::testing {

namespace {

class HeldContexts final : public doctest::IReporter {
 public:
  explicit HeldContexts(const doctest::ContextOptions& /*options*/) {}

  void test_run_start() override {
    if (simulator() != nullptr) return;
    for (int ordinal = 0; has_device(ordinal); ++ordinal) {
      contexts_.push_back(std::make_unique<cuda::PrimaryContext>(ordinal));
    }
  }
  void test_run_end(const doctest::TestRunStats& /*stats*/) override { contexts_.clear(); }

  void report_query(const doctest::QueryData& /*data*/) override {}
  void test_case_start(const doctest::TestCaseData& /*data*/) override {}
  void test_case_reenter(const doctest::TestCaseData& /*data*/) override {}
  void test_case_end(const doctest::CurrentTestCaseStats& /*stats*/) override {}
  void test_case_exception(const doctest::TestCaseException& /*exception*/) override {}
  void subcase_start(const doctest::SubcaseSignature& /*signature*/) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData& /*data*/) override {}
  void log_message(const doctest::MessageData& /*data*/) override {}
  void test_case_skipped(const doctest::TestCaseData& /*data*/) override {}

 private:
  std::vector<std::unique_ptr<cuda::PrimaryContext>> contexts_;
};

}  // namespace

DOCTEST_REGISTER_LISTENER("held_contexts", 1, HeldContexts);

}  // namespace dcp_fast::testing
