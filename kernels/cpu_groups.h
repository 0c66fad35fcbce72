// The rows of a batch, sorted by tenant: rows of one tenant lie together whatever their order in the batch, so that its signs are
// read once for up to `most` of them. Decides the order of work only; a kernel's result may not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace bitdelta {

// Rows of one slot, at most `most` of them: rows()[first], ... rows()[first + count - 1]. slot -1: the base's.
struct Group {
  int64_t slot, first, count;
};

class Groups {
 public:
  // slot_of(m): slot of row m of M, in [-1, slots).
  template <typename SlotOf>
  Groups(int64_t M, int64_t slots, int64_t most, const SlotOf& slot_of)
      : rows_(new int64_t[M]), groups_(new Group[M / most + std::min(M, slots + 1)]) {
    const std::unique_ptr<int64_t[]> place(new int64_t[slots + 2]());
    for (int64_t m = 0; m < M; ++m) ++place[slot_of(m) + 2];
    for (int64_t slot = -1; slot < slots; ++slot) {
      const int64_t first = place[slot + 1], end = place[slot + 2] += first;
      for (int64_t at = first; at < end; at += most) groups_[size_++] = Group{slot, at, std::min(most, end - at)};
    }
    for (int64_t m = 0; m < M; ++m) rows_[place[slot_of(m) + 1]++] = m;
  }

  int64_t size() const { return size_; }
  const Group& operator[](int64_t i) const { return groups_[i]; }
  int64_t row(int64_t at) const { return rows_[at]; }
  const int64_t* rows(const Group& group) const { return rows_.get() + group.first; }

 private:
  std::unique_ptr<int64_t[]> rows_;
  std::unique_ptr<Group[]> groups_;
  int64_t size_ = 0;
};

}  // namespace bitdelta
