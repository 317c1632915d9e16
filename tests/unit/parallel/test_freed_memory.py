import subprocess
import sys

PROGRAM = """
import ctypes, sys
if sys.argv[1] == "prepared":
    from realsr_hpc.parallel import backend
    backend.prepare()
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):  # of glibc's malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d keepcost".split()]
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
mapped = libc.mallinfo2().hblks
block = libc.malloc(24 << 20)
used = libc.mallinfo2()
libc.free(ctypes.c_void_p(block))
print(used.hblks - mapped, used.arena - libc.mallinfo2().arena)
"""


def block_of_24_mib(how: str) -> list[int]:
    """Whether the block was mapped separately, and by how much the heap shrank after it was freed."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return [int(number) for number in ran.stdout.split()]


def test_the_memory_of_freed_tensors_stays_in_the_heap():
    assert block_of_24_mib("prepared") == [0, 0]
    assert block_of_24_mib("plain")[0] == 1
