/* The ring's protocol in C11: how one process writes a record while others read it. Nothing of Python's is in here, so
   that tests/step/ring_torture.c can run it by itself, also on another processor.

   Where things are in a slot, and what a reader in Python checks: kvhook/ring/layout.py and kvhook/ring/reader.py.

   A reader takes record n if it finds stamp 2n+2 before and after it has copied the slot, or if the head, read again
   after the copy, says that the writer cannot have come round to it. So these must hold on every processor:

     1. a reader that sees a byte of a new body also sees the odd stamp if it looks at the stamp afterwards: between the
        odd stamp (relaxed) and the body's plain stores stands a release fence, and between the reader's copy and its
        second look an acquire fence. The two fences synchronise by way of any byte of the body (C11 7.17.4);
     2. a reader that sees the even stamp sees the whole body: store-release, and load-acquire at the first look;
     3. a reader that sees the head at n+1 sees record n's stamp and body: the same for the head;
     4. a reader that sees a byte of record n+capacity sees the head at n+capacity or later, if it looks at the head
        after its acquire fence: record n+capacity's release fence comes after the store of that head.

   Of 4 follows the test by the head alone: if the head, read again after the copy, is still below n+capacity, no byte
   of what was copied belongs to a later record.

   On x86-64 all of it is plain moves: the processor keeps store-store and load-load order, and the fences and orders
   keep the compiler from reordering. On ARM64 they become `dmb ish`, `stlr` and `ldar`. The body is not made of
   atomics, as in every seqlock; a reader copies bytes and believes none of them before it has checked.

   tests/step/test_memory_model.py tries every execution that C11 allows, and finds none that is torn; without any one
   of the fences and orders it finds some. */

#ifndef KVHOOK_RING_PROTOCOL_H
#define KVHOOK_RING_PROTOCOL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Slot offsets, as in kvhook/ring/layout.py; a test compares them. */
enum { STAMP_AT = 0, CRC_AT = 8, BODY_AT = 16, FIELDS_AT = 32, HEAD_AT = 128 };

typedef struct {
    uint8_t *map;   /* the whole file */
    uint8_t *first; /* slot 0 */
    uint64_t mask;  /* capacity - 1, the capacity being a power of two */
    uint64_t slot;  /* bytes */
} Ring;

/* crc32 of the body, or 0 where the ring has none */
typedef uint32_t (*Crc)(const uint8_t *data, size_t size);

static inline _Atomic uint64_t *ring_word(uint8_t *at) { return (_Atomic uint64_t *)at; }

static inline void ring_write(const Ring *ring, uint64_t n, const void *body, Crc crc)
{
    uint8_t *slot = ring->first + (n & ring->mask) * ring->slot;
    atomic_store_explicit(ring_word(slot + STAMP_AT), 2 * n + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    if (crc != NULL) {
        uint64_t sum = crc(body, ring->slot - BODY_AT);
        memcpy(slot + CRC_AT, &sum, sizeof sum);
    }
    memcpy(slot + BODY_AT, body, ring->slot - BODY_AT);
    atomic_store_explicit(ring_word(slot + STAMP_AT), 2 * n + 2, memory_order_release);
    atomic_store_explicit(ring_word(ring->map + HEAD_AT), n + 1, memory_order_release);
}

static inline uint64_t ring_head(const Ring *ring)
{
    return atomic_load_explicit(ring_word(ring->map + HEAD_AT), memory_order_acquire);
}

/* Copy the body of record n; whether it is whole by its stamps, and (`kept`) whether the head says so as well. */
static inline bool ring_read(const Ring *ring, uint64_t n, void *body, bool *kept)
{
    uint8_t *slot = ring->first + (n & ring->mask) * ring->slot;
    bool whole = atomic_load_explicit(ring_word(slot + STAMP_AT), memory_order_acquire) == 2 * n + 2;
    memcpy(body, slot + BODY_AT, ring->slot - BODY_AT);
    atomic_thread_fence(memory_order_acquire);
    *kept = atomic_load_explicit(ring_word(ring->map + HEAD_AT), memory_order_relaxed) < n + ring->mask + 1;
    return whole && atomic_load_explicit(ring_word(slot + STAMP_AT), memory_order_relaxed) == 2 * n + 2;
}

#endif
