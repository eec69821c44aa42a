// SPDX-License-Identifier: Apache-2.0
//
// cuBLASLt FP16 peer. The library is loaded at run time and its few entry points and enum
// values are declared here (stable since CUDA 12), so that the benchmark builds without it.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "peers.h"

namespace prefixquant::bench {
namespace {

// Values of cublasComputeType_t, cudaDataType_t and the cublasLt attribute enums.
enum { kCompute32F = 68 };
enum { kReal32F = 0, kReal16F = 2 };
enum { kDescTransA = 3, kDescTransB = 4 };
enum { kPreferenceWorkspace = 1 };
enum { kOpN = 0, kOpT = 1 };

struct Algo {
  uint64_t data[8];
};
struct HeuristicResult {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

template <typename Function>
Function find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) throw std::runtime_error(std::string("cublasLt has no ") + name);
  return reinterpret_cast<Function>(symbol);
}

struct Library {
  using Handle = void*;
  int (*create)(Handle*);
  int (*matmul)(Handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b,
                void* b_layout, const void* beta, const void* c, void* c_layout, void* d,
                void* d_layout, const Algo*, void* workspace, size_t bytes, cudaStream_t);
  int (*desc_create)(void**, int compute, int scale);
  int (*desc_set)(void*, int attribute, const void*, size_t);
  int (*layout_create)(void**, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*preference_create)(void**);
  int (*preference_set)(void*, int attribute, const void*, size_t);
  int (*heuristic)(Handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                   int requested, HeuristicResult*, int* found);
  Handle handle = nullptr;
  void* workspace = nullptr;
  static constexpr size_t kWorkspaceBytes = size_t{64} << 20;

  static Library* get() {
    static Library* const library = load();
    return library;
  }

 private:
  static Library* load() {
    void* so = nullptr;
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
      if (so == nullptr) so = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (so == nullptr) {
      std::fprintf(stderr, "cublasLt not found: %s\n", dlerror());
      return nullptr;
    }
    auto* l = new Library;
    l->create = find<decltype(create)>(so, "cublasLtCreate");
    l->matmul = find<decltype(matmul)>(so, "cublasLtMatmul");
    l->desc_create = find<decltype(desc_create)>(so, "cublasLtMatmulDescCreate");
    l->desc_set = find<decltype(desc_set)>(so, "cublasLtMatmulDescSetAttribute");
    l->layout_create = find<decltype(layout_create)>(so, "cublasLtMatrixLayoutCreate");
    l->preference_create = find<decltype(preference_create)>(so, "cublasLtMatmulPreferenceCreate");
    l->preference_set = find<decltype(preference_set)>(so, "cublasLtMatmulPreferenceSetAttribute");
    l->heuristic = find<decltype(heuristic)>(so, "cublasLtMatmulAlgoGetHeuristic");
    if (l->create(&l->handle) != 0) throw std::runtime_error("cublasLtCreate failed");
    if (cudaMalloc(&l->workspace, kWorkspaceBytes) != cudaSuccess)
      throw std::runtime_error("cublasLt peer: out of device memory");
    return l;
  }
};

struct Plan {
  void *desc, *a, *b, *d;
  std::vector<HeuristicResult> algos;  // best first; the first one that runs is kept
};

// Column-major view: D[N, M] = W^T[N, K] * X[K, M].
Plan make_plan(const Library& l, int m, int n, int k) {
  Plan plan;
  void* preference = nullptr;
  const int transpose = kOpT, plain = kOpN;
  const size_t workspace = Library::kWorkspaceBytes;
  int failed = l.desc_create(&plan.desc, kCompute32F, kReal32F);
  failed |= l.desc_set(plan.desc, kDescTransA, &transpose, sizeof(int));
  failed |= l.desc_set(plan.desc, kDescTransB, &plain, sizeof(int));
  failed |= l.layout_create(&plan.a, kReal16F, k, n, k);
  failed |= l.layout_create(&plan.b, kReal16F, k, m, k);
  failed |= l.layout_create(&plan.d, kReal16F, n, m, n);
  failed |= l.preference_create(&preference);
  failed |= l.preference_set(preference, kPreferenceWorkspace, &workspace, sizeof(workspace));
  plan.algos.resize(8);
  int found = 0;
  failed |= l.heuristic(l.handle, plan.desc, plan.a, plan.b, plan.d, plan.d, preference, 8,
                        plan.algos.data(), &found);
  plan.algos.resize(found);
  if (failed != 0 || found == 0) throw std::runtime_error("cublasLt peer: no algorithm");
  return plan;
}

}  // namespace

PeerLaunch make_cublaslt_fp16() {
  Library* library = Library::get();
  if (library == nullptr) return {};
  auto plans = std::make_shared<std::map<std::tuple<int, int, int>, Plan>>();
  return [=](const void* x, const void* w, void* out, int m, int n, int k, cudaStream_t stream) {
    const auto key = std::make_tuple(m, n, k);
    auto it = plans->find(key);
    if (it == plans->end()) it = plans->emplace(key, make_plan(*library, m, n, k)).first;
    Plan& plan = it->second;
    const float one = 1.0f, zero = 0.0f;
    while (!plan.algos.empty()) {
      const int status = library->matmul(library->handle, plan.desc, &one, w, plan.a, x, plan.b,
                                         &zero, out, plan.d, out, plan.d, &plan.algos[0].algo,
                                         library->workspace, Library::kWorkspaceBytes, stream);
      if (status == 0) return;
      std::fprintf(stderr, "cublasLt: %d x %d x %d, status %d, trying the next algorithm\n", m, n,
                   k, status);
      plan.algos.erase(plan.algos.begin());
    }
    throw std::runtime_error("cublasLt peer: no algorithm runs");
  };
}

}  // namespace prefixquant::bench
