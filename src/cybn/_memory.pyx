"""Memory of large results: kept when an array dies, handed to the next one of about its size.

New memory must be paged in and cleared by the system, which takes longer than the normalization itself (98 MB: 86 ms in
pages of 4 KB, where writing takes 5 ms). The C library keeps what is small, but gives the end of its memory back when a
few results die together: in a network of 0.8 MB a layer, each took 0.4 ms, and takes 20 us. NumPy lets an array have an
allocator of its own (NEP 49), so results are ordinary arrays: they own their data, can be resized, and are counted by
tracemalloc.

A training step needs again what all of its layers have left, so as much as an eighth of the memory may be kept; but
what thousands of results have not needed is of no use, and goes. (Their number, not time: after a pause of any length
a request finds the memory of the one before.)

Rejected: telling the system that it may take kept memory back (MADV_FREE), which costs 2 ms per 98 MB in small pages
and makes the next use slower still; the C library's own cache, which ends at 32 MiB and knows no huge pages.
"""
import os

from cybn import _cgroup
from cybn._environment import number

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy, memset, strcpy
from numpy cimport ndarray

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept
        void *(*calloc)(void *, size_t, size_t) noexcept
        void *(*realloc)(void *, void *, size_t) noexcept
        void (*free)(void *, void *, size_t) noexcept
    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator
    object PyDataMem_SetHandler(object)
    object PyArray_NewLikeArray(ndarray, cnp.NPY_ORDER, void *, int)

cdef extern from *:
    """
    #include <stddef.h>
    #define CYBN_HUGE ((size_t)2 << 20)
    #if defined(__linux__)
    #include <stdint.h>
    #include <sys/mman.h>
    #define CYBN_CAN_KEEP 1
    static char *cybn_pages(size_t n) {
        void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return p == MAP_FAILED ? NULL : (char *)p;
    }
    /* n bytes; a multiple of the huge page aligned to it. */
    static void *cybn_map(size_t n) {
        char *p;
        size_t skip;
        if (n % CYBN_HUGE) return cybn_pages(n);
        p = cybn_pages(n + CYBN_HUGE);
        if (p == NULL) return NULL;
        skip = (size_t)(-(uintptr_t)p & (CYBN_HUGE - 1));
        if (skip) munmap(p, skip);
        munmap(p + skip + n, CYBN_HUGE - skip);
        madvise(p + skip, n, MADV_HUGEPAGE);    /* a wish: works as well without */
        return p + skip;
    }
    static void cybn_unmap(void *p, size_t n) { munmap(p, n); }
    #else
    #define CYBN_CAN_KEEP 0
    static void *cybn_map(size_t n) { (void)n; return NULL; }
    static void cybn_unmap(void *p, size_t n) { (void)p; (void)n; }
    #endif

    /* Tried, not waited for: who does not get it goes to the system. So no fork can leave it locked to a wait. */
    static char cybn_keeping = 0;
    #if defined(_MSC_VER)
    static int cybn_try_keep(void) { return 0; }
    static void cybn_end_keep(void) {}
    #else
    static int cybn_try_keep(void) {
        int tries;
        for (tries = 0; tries < 100; tries++)
            if (!__atomic_test_and_set(&cybn_keeping, __ATOMIC_ACQUIRE)) return 1;
        return 0;
    }
    static void cybn_end_keep(void) { __atomic_clear(&cybn_keeping, __ATOMIC_RELEASE); }
    #endif
    """
    const size_t CYBN_HUGE
    const int CYBN_CAN_KEEP
    void *cybn_map(size_t n) noexcept
    void cybn_unmap(void *p, size_t n) noexcept
    bint cybn_try_keep() noexcept
    void cybn_end_keep() noexcept

can_keep = CYBN_CAN_KEEP != 0
"""Whether memory is kept on this system: Linux, for now."""

cdef enum:
    LARGE = 128 << 10   # bytes from which memory is kept: smaller ones the C library's own cache serves well
    GRAIN = 16 << 10    # what smaller blocks are multiples of: a huge page is too much where there may be many
    HUGE = 1 << 20      # bytes from which they are of huge pages
    BLOCKS = 1024       # blocks kept at most
    UNUSED = 4096       # results that die before a block that none has used goes: 40 steps of a network of 50 layers
    # Of the data in its block: not near the 16 of NumPy's own arrays, or on some processors every load of x would wait
    # for a store to y whose address ends in the same 12 bits.
    START = 2048

cdef struct Block:
    # Stands at the beginning of its own memory.
    size_t size

cdef Block *kept[BLOCKS]    # the oldest first
cdef size_t sizes[BLOCKS]   # theirs, so that no block is touched for its size
cdef size_t died[BLOCKS]    # and how many results had died before theirs
cdef size_t deaths = 0
cdef Py_ssize_t count = 0
cdef size_t kept_bytes = 0
cdef size_t most_bytes = 0


cdef Block *find(size_t size) noexcept:
    """Take out the smallest kept block that holds `size` bytes and wastes less than an eighth, or NULL.

    Of those the youngest: it may still be in a cache.
    """
    cdef Py_ssize_t i, best = -1
    cdef Block *block = NULL
    if not cybn_try_keep():
        return NULL
    for i in range(count - 1, -1, -1):
        if size <= sizes[i] <= size + size // 8 and (best < 0 or sizes[i] < sizes[best]):
            best = i
            if sizes[i] == size:
                break
    if best >= 0:
        block = kept[best]
        remove(best)
    cybn_end_keep()
    return block


cdef void remove(Py_ssize_t index) noexcept:
    global count, kept_bytes
    cdef Py_ssize_t i
    kept_bytes -= sizes[index]
    count -= 1
    for i in range(index, count):
        kept[i] = kept[i + 1]
        sizes[i] = sizes[i + 1]
        died[i] = died[i + 1]


cdef void drop_oldest() noexcept:
    cdef Block *block = kept[0]
    remove(0)
    cybn_unmap(block, block.size)


cdef bint keep(Block *block) noexcept:
    """Whether the block is kept; older ones may go for it."""
    global count, deaths, kept_bytes
    if block.size > most_bytes or not cybn_try_keep():
        return False
    while count == BLOCKS or kept_bytes + block.size > most_bytes:
        drop_oldest()
    if count and deaths - died[0] > UNUSED:
        drop_oldest()   # (one at a time: each costs the system's time)
    kept[count] = block
    sizes[count] = block.size
    died[count] = deaths
    deaths += 1
    count += 1
    kept_bytes += block.size
    cybn_end_keep()
    return True


# ------------------------------------------------------------------------------------------ NumPy's allocator interface

cdef void *allocate(void *context, size_t n) noexcept:
    cdef size_t grain = CYBN_HUGE if n >= HUGE else GRAIN
    cdef size_t size = (n + START + grain - 1) // grain * grain
    cdef Block *block
    if size < n:
        return NULL
    block = find(size)
    if block == NULL:
        block = <Block *> cybn_map(size)
        if block == NULL:
            return NULL
        block.size = size
    return <char *> block + START


cdef void *allocate_zeros(void *context, size_t n, size_t itemsize) noexcept:
    cdef void *p
    if itemsize and n > (<size_t> -1) // itemsize:
        return NULL
    p = allocate(context, n * itemsize)
    if p != NULL:
        memset(p, 0, n * itemsize)
    return p


cdef void release(void *context, void *p, size_t n) noexcept:
    cdef Block *block = <Block *> (<char *> p - START)
    if p != NULL and not keep(block):
        cybn_unmap(block, block.size)


cdef void *reallocate(void *context, void *p, size_t n) noexcept:
    cdef void *new = allocate(context, n)
    if new != NULL and p != NULL:
        memcpy(new, p, min(n, (<Block *> (<char *> p - START)).size - START))
        release(context, p, 0)
    return new


cdef PyDataMem_Handler handler
strcpy(handler.name, b"cybn")
handler.version = 1
handler.allocator.ctx = NULL
handler.allocator.malloc = allocate
handler.allocator.calloc = allocate_zeros
handler.allocator.realloc = reallocate
handler.allocator.free = release

cdef object capsule = PyCapsule_New(&handler, "mem_handler", NULL)


# ----------------------------------------------------------------------------------------------------------- for cybn

cdef ndarray new_array(ndarray a, cnp.NPY_ORDER order, object dtype, bint kept):
    """A new array of a's shape and dtype (None) or another, its values undefined. `kept`: in memory that is, if any."""
    cdef void *descr = NULL
    if dtype is not None:
        Py_INCREF(dtype)    # NumPy's function takes it over
        descr = <void *> dtype
    if not kept or most_bytes == 0:
        return PyArray_NewLikeArray(a, order, descr, 0)
    before = PyDataMem_SetHandler(capsule)
    try:
        return PyArray_NewLikeArray(a, order, descr, 0)
    finally:
        PyDataMem_SetHandler(before)


cdef ndarray new_bytes(cnp.npy_intp n):
    """A new array of n bytes, its values undefined."""
    if n < LARGE or most_bytes == 0:
        return cnp.PyArray_EMPTY(1, &n, cnp.NPY_UINT8, 0)
    before = PyDataMem_SetHandler(capsule)
    try:
        return cnp.PyArray_EMPTY(1, &n, cnp.NPY_UINT8, 0)
    finally:
        PyDataMem_SetHandler(before)


cdef ndarray new_like(ndarray x):
    """A new array of x's shape, dtype and memory layout, its values undefined."""
    return new_array(x, cnp.NPY_KEEPORDER, None, cnp.PyArray_NBYTES(x) >= LARGE)


cdef ndarray new_dense(ndarray a, cnp.dtype dtype):
    """A new array of a's shape in C order, its values undefined, for the time of a call."""
    return new_array(a, cnp.NPY_CORDER, dtype, cnp.PyArray_SIZE(a) * dtype.itemsize >= LARGE)


cdef ndarray dense_copy(ndarray a, cnp.dtype dtype):
    """A copy of `a` in C order, for the time of a call."""
    cdef ndarray copy = new_dense(a, dtype)
    cnp.PyArray_CopyInto(copy, a)
    return copy


def set_cache_max_bytes(size_t n):
    """Set how many bytes of dead results are kept at most (0: none, and NumPy allocates). Return the number before."""
    global most_bytes
    before = most_bytes
    most_bytes = n if CYBN_CAN_KEEP else 0
    empty_cache()
    return before


def empty_cache():
    """Give the memory that dead results have left to the system.

    cybn keeps up to ``CYBN_CACHE_MAX_BYTES`` (an environment variable, by default an eighth of the memory that the
    machine has or the control groups allow; 0: none) of the memory of large results (128 KiB or more) that are no
    longer in use, because new memory costs more time than the arithmetic. What 4096 later ones have not needed goes by
    itself. Arrays that are in use are not affected.
    """
    if not cybn_try_keep():
        return
    while count:
        drop_oldest()
    cybn_end_keep()


def cached_bytes():
    """Bytes kept at the moment."""
    return kept_bytes


def cache_max_bytes():
    """Bytes kept at most."""
    return most_bytes


def usable_bytes():
    """Of memory: what the machine has, or the control groups allow."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):   # not this system's names
        machine = 0
    return min((n for n in (machine, _cgroup.memory() or 0) if n > 0), default=0)


set_cache_max_bytes(number("CYBN_CACHE_MAX_BYTES", usable_bytes() // 8))
