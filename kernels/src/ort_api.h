// The part of onnxruntime's C interface that this library uses, declared by hand.
//
// onnxruntime hands a custom operator library a table of functions. New functions are only ever appended to the table,
// so the position of a function identifies it in every later version, and no header of onnxruntime is needed. The
// positions below were read from the order of `OrtApi` in the published header; tests call every one of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#if defined(_WIN32)
#define VLPACK_EXPORT extern "C" __declspec(dllexport)
#define VLPACK_CALL __stdcall
#else
#define VLPACK_EXPORT extern "C" __attribute__((visibility("default")))
#define VLPACK_CALL
#endif

namespace ort {

// Opaque types of onnxruntime; only pointers to them are handled.
struct Status;
struct Value;
struct Shape;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;

// The version of the table whose functions are used: KernelContext_ParallelFor came with 17.
constexpr uint32_t kVersion = 17;

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kBrain = 16 };
enum Presence : int { kRequired = 0, kOptional = 1 };
constexpr int kInvalidArgument = 2;  // an error code

// The table of functions.
using Table = const void* const*;

struct ApiBase {
  Table(VLPACK_CALL* get_api)(uint32_t version);
  const char*(VLPACK_CALL* version_string)();
};

// Positions of functions in the table.
enum Position : size_t {
  kCreateStatus = 0,
  kCreateDomain = 26,
  kAddToDomain = 27,
  kAddDomain = 28,
  kMutableData = 51,
  kDimensionCount = 61,
  kDimensions = 62,
  kTypeAndShape = 65,
  kAttributeFloat = 85,
  kAttributeInt = 86,
  kInputCount = 88,
  kInput = 90,
  kOutput = 91,
  kReleaseStatus = 93,
  kReleaseShape = 99,
  kConstantInput = 249,
  kParallelFor = 274,
};

// onnxruntime's description of a custom operator. The order of the members is part of its binary interface.
struct CustomOp {
  uint32_t version = kVersion;
  void*(VLPACK_CALL* create_kernel)(const CustomOp*, Table, const KernelInfo*) = nullptr;
  const char*(VLPACK_CALL* name)(const CustomOp*) = nullptr;
  const char*(VLPACK_CALL* provider)(const CustomOp*) = nullptr;
  int(VLPACK_CALL* input_type)(const CustomOp*, size_t) = nullptr;
  size_t(VLPACK_CALL* input_count)(const CustomOp*) = nullptr;
  int(VLPACK_CALL* output_type)(const CustomOp*, size_t) = nullptr;
  size_t(VLPACK_CALL* output_count)(const CustomOp*) = nullptr;
  void(VLPACK_CALL* compute)(void*, KernelContext*) = nullptr;
  void(VLPACK_CALL* destroy)(void*) = nullptr;
  int(VLPACK_CALL* input_presence)(const CustomOp*, size_t) = nullptr;
  int(VLPACK_CALL* output_presence)(const CustomOp*, size_t) = nullptr;
  int(VLPACK_CALL* input_memory)(const CustomOp*, size_t) = nullptr;
  int(VLPACK_CALL* variadic_input_least)(const CustomOp*) = nullptr;
  int(VLPACK_CALL* variadic_input_equal)(const CustomOp*) = nullptr;
  int(VLPACK_CALL* variadic_output_least)(const CustomOp*) = nullptr;
  int(VLPACK_CALL* variadic_output_equal)(const CustomOp*) = nullptr;
  Status*(VLPACK_CALL* create_kernel_checked)(const CustomOp*, Table, const KernelInfo*, void**) = nullptr;
  Status*(VLPACK_CALL* compute_checked)(void*, KernelContext*) = nullptr;
  Status*(VLPACK_CALL* infer_shape)(const CustomOp*, void*) = nullptr;
  int(VLPACK_CALL* start_version)(const CustomOp*) = nullptr;
  int(VLPACK_CALL* end_version)(const CustomOp*) = nullptr;
  // Members of later versions, which onnxruntime does not read for `version` 17.
  const void* later[4] = {};
};

// An error that ends the call; the caller of the session gets its text.
struct Error {
  std::string text;
};

// Typed calls through the table. A status other than null becomes an Error.
class Api {
 public:
  explicit Api(Table table) : table_(table) {}

  Status* status(const std::string& text) const {
    return at<Status*(int, const char*)>(kCreateStatus)(kInvalidArgument, text.c_str());
  }

  int64_t int_attribute(const KernelInfo* info, const char* name) const {
    int64_t value = 0;
    check(at<Status*(const KernelInfo*, const char*, int64_t*)>(kAttributeInt)(info, name, &value), name);
    return value;
  }

  // The same, or `otherwise` if the node does not have the attribute.
  int64_t int_attribute(const KernelInfo* info, const char* name, int64_t otherwise) const {
    int64_t value = 0;
    Status* status = at<Status*(const KernelInfo*, const char*, int64_t*)>(kAttributeInt)(info, name, &value);
    if (!status) return value;
    at<void(Status*)>(kReleaseStatus)(status);
    return otherwise;
  }

  float float_attribute(const KernelInfo* info, const char* name) const {
    float value = 0;
    check(at<Status*(const KernelInfo*, const char*, float*)>(kAttributeFloat)(info, name, &value), name);
    return value;
  }

  // The value of an input that is an initializer of the graph; null if it is not.
  const Value* constant(const KernelInfo* info, size_t index) const {
    int is_constant = 0;
    const Value* value = nullptr;
    using Get = Status*(const KernelInfo*, size_t, int*, const Value**);
    check(at<Get>(kConstantInput)(info, index, &is_constant, &value), "initializer");
    return is_constant ? value : nullptr;
  }

  size_t input_count(const KernelContext* context) const {
    size_t count = 0;
    check(at<Status*(const KernelContext*, size_t*)>(kInputCount)(context, &count), "inputs");
    return count;
  }

  // The value of an input; null if it is optional and not given.
  const Value* input(const KernelContext* context, size_t index) const {
    const Value* value = nullptr;
    check(at<Status*(const KernelContext*, size_t, const Value**)>(kInput)(context, index, &value), "input");
    return value;
  }

  Value* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank) const {
    Value* value = nullptr;
    using Get = Status*(KernelContext*, size_t, const int64_t*, size_t, Value**);
    check(at<Get>(kOutput)(context, index, sizes, rank, &value), "output");
    return value;
  }

  void* data(const Value* value) const {
    void* pointer = nullptr;
    check(at<Status*(Value*, void**)>(kMutableData)(const_cast<Value*>(value), &pointer), "data");
    return pointer;
  }

  // Writes at most `room` sizes of a tensor's dimensions, and returns its rank.
  size_t sizes(const Value* value, int64_t* sizes, size_t room) const {
    Shape* shape = nullptr;
    size_t rank = 0;
    check(at<Status*(const Value*, Shape**)>(kTypeAndShape)(value, &shape), "shape");
    Status* first = at<Status*(const Shape*, size_t*)>(kDimensionCount)(shape, &rank);
    Status* second = nullptr;
    if (!first && rank <= room) second = at<Status*(const Shape*, int64_t*, size_t)>(kDimensions)(shape, sizes, rank);
    at<void(Shape*)>(kReleaseShape)(shape);
    check(first, "rank");
    check(second, "sizes");
    if (rank > room) throw Error{"a tensor has more dimensions than the operator takes"};
    return rank;
  }

  // Calls task(data, index) for every index below `count`, on the threads of the session.
  void parallel(const KernelContext* context, void (*task)(void*, size_t), size_t count, void* data) const {
    if (count == 0) return;
    using Run = Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    check(at<Run>(kParallelFor)(context, task, count, 0, data), "threads");
  }

  void create_domain(const char* name, Domain** domain) const {
    check(at<Status*(const char*, Domain**)>(kCreateDomain)(name, domain), "domain");
  }
  void add(Domain* domain, const CustomOp* op) const {
    check(at<Status*(Domain*, const CustomOp*)>(kAddToDomain)(domain, op), "operator");
  }
  void add(SessionOptions* options, Domain* domain) const {
    check(at<Status*(SessionOptions*, Domain*)>(kAddDomain)(options, domain), "domain");
  }

 private:
  template <class Function>
  Function* at(Position position) const {
    return reinterpret_cast<Function*>(const_cast<void*>(table_[position]));
  }

  void check(Status* status, const char* what) const {
    if (!status) return;
    at<void(Status*)>(kReleaseStatus)(status);
    throw Error{std::string("onnxruntime cannot give the operator its ") + what};
  }

  Table table_;
};

// `Api::parallel` for a function object.
template <class Task>
void parallel_for(const Api& api, const KernelContext* context, int64_t count, const Task& task) {
  api.parallel(
      context, [](void* data, size_t index) { (*static_cast<const Task*>(data))(static_cast<int64_t>(index)); },
      static_cast<size_t>(count), const_cast<Task*>(&task));
}

}  // namespace ort
