// Runs one generated kernel on arguments that a file holds, and writes its tensors back: for processors that Python does
// not run on. Compiled together with the kernel; KERNEL is its exported function.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Arguments;
namespace attention { struct Arguments; extern "C" void KERNEL(Arguments*); }

static void fail(const char* what) { fprintf(stderr, "%s\n", what); exit(2); }

// The file: number of slots and of memories; the slots; for each memory its slot, the offset of its first element in
// bytes, its size in bytes and its bytes.
int main(int, char** names) {
  FILE* file = fopen(names[1], "r+b");
  if (!file) fail("no such file");
  int64_t counts[2];
  if (fread(counts, 8, 2, file) != 2) fail("no counts");
  std::vector<int64_t> slots(counts[0]);
  if (fread(slots.data(), 8, counts[0], file) != slots.size()) fail("no slots");
  std::vector<std::vector<char>> memories(counts[1]);
  std::vector<long> places;
  for (auto& memory : memories) {
    int64_t head[3];
    if (fread(head, 8, 3, file) != 3) fail("no head");
    memory.resize(head[2]);
    places.push_back(ftell(file));
    if (fread(memory.data(), 1, memory.size(), file) != memory.size()) fail("no bytes");
    slots[head[0]] = (int64_t)(memory.data() + head[1]);
  }
  attention::KERNEL((attention::Arguments*)slots.data());
  for (size_t i = 0; i < memories.size(); ++i) {
    fseek(file, places[i], SEEK_SET);
    fwrite(memories[i].data(), 1, memories[i].size(), file);
  }
  return fclose(file);
}
