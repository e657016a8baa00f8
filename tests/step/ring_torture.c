/* The ring's protocol (kvhook/_step/ring_protocol.h) between two processes: one writes at full speed, the other reads
   as fast as it can what the first is about to overwrite, and looks at every word of what it was told is whole.

       ring_torture RECORDS_TO_READ SLOT_BYTES [break]

   `break` leaves the odd stamp out: the reader must then find torn records, or it sees nothing. Prints a line of
   figures; exit code 1 if a record was accepted that is not whole (with `break`: if none was). */

#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kvhook/_step/ring_protocol.h"

enum { HEADER = 4096, CAPACITY = 8 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Word k of record n. */
static inline uint64_t word(uint64_t n, uint64_t k) { return n * 0x9E3779B97F4A7C15u + k; }

static void fill(uint64_t *body, uint64_t n, uint64_t words)
{
    for (uint64_t k = 0; k < words; k++)
        body[k] = word(n, k);
}

static void write_for_ever(const Ring *ring, bool broken)
{
    uint64_t words = (ring->slot - BODY_AT) / 8, *body = malloc(ring->slot);
    for (uint64_t n = 0;; n++) {
        fill(body, n, words);
        if (broken) { /* the body first, and stamps that are even all the time */
            uint8_t *slot = ring->first + (n & ring->mask) * ring->slot;
            memcpy(slot + BODY_AT, body, ring->slot - BODY_AT);
            atomic_store_explicit(ring_word(slot + STAMP_AT), 2 * n + 2, memory_order_release);
            atomic_store_explicit(ring_word(ring->map + HEAD_AT), n + 1, memory_order_release);
        }
        else
            ring_write(ring, n, body, NULL);
    }
}

int main(int count, char **arguments)
{
    uint64_t wanted = count > 1 ? strtoull(arguments[1], NULL, 10) : 1000000;
    uint64_t slot = count > 2 ? strtoull(arguments[2], NULL, 10) : 448;
    bool broken = count > 3 && strcmp(arguments[3], "break") == 0;
    uint8_t *map = mmap(NULL, HEADER + CAPACITY * slot, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || slot % 64 || slot < 64)
        return 2;
    Ring ring = {map, map + HEADER, CAPACITY - 1, slot};
    pid_t writer = fork();
    if (writer == 0)
        write_for_ever(&ring, broken);
    uint64_t words = (slot - BODY_AT) / 8, *body = malloc(slot);
    uint64_t reads = 0, by_stamp = 0, by_head = 0, torn_by_stamp = 0, torn_by_head = 0;
    double start = now();
    while (ring_head(&ring) < 4 * CAPACITY)
        ;
    uint64_t first = ring_head(&ring);
    while (reads < wanted && !(broken && torn_by_stamp)) {
        uint64_t head = ring_head(&ring);
        for (uint64_t back = CAPACITY; back >= 1 && reads < wanted; back--) { /* the oldest is overwritten next */
            uint64_t n = head - back;
            bool kept, whole = ring_read(&ring, n, body, &kept), right = true;
            reads++;
            if (!whole && !kept)
                continue;
            for (uint64_t k = 0; k < words; k++)
                right &= body[k] == word(n, k);
            by_stamp += whole;
            by_head += kept;
            torn_by_stamp += whole && !right;
            torn_by_head += kept && !right;
        }
    }
    double seconds = now() - start;
    uint64_t written = ring_head(&ring) - first;
    kill(writer, SIGKILL);
    waitpid(writer, NULL, 0);
    printf("%llu reads, accepted by stamps %llu of which torn %llu, by the head %llu of which torn %llu; "
           "%llu written, %.2f million a second\n",
           (unsigned long long)reads, (unsigned long long)by_stamp, (unsigned long long)torn_by_stamp,
           (unsigned long long)by_head, (unsigned long long)torn_by_head, (unsigned long long)written,
           (double)written / seconds / 1e6);
    return broken ? torn_by_stamp == 0 : torn_by_stamp + torn_by_head > 0;
}
