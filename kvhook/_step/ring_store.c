/* The ring's writer as an object of Python's, in place of the function that kvhook/ring/writer.py makes: called as
   `publish(n, record)`. The protocol itself is in ring_protocol.h.

   One thread writes a ring, and it holds the GIL while it does. A free-threaded build is refused (module.c): there
   other threads could add a request to an engine while its step is being published. */

#include "step.h"

#include <structmember.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    Py_buffer map;
    Ring ring;
    unsigned generation;
    bool crc;
} RingStore;

/* How many forks lie behind this process, as kvhook.forks counts them. A forked child shares its parent's rings, and
   must not write into them. */
static unsigned generation;

PyObject *ring_forked(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    generation++;
    Py_RETURN_NONE;
}

/* The crc32 of zlib, of which no header may be there when this is built. */
uint32_t ring_crc32(const uint8_t *data, size_t size)
{
    static uint32_t table[8][256];
    if (table[0][1] == 0) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t crc = i;
            for (int bit = 0; bit < 8; bit++)
                crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
            table[0][i] = crc;
        }
        for (uint32_t i = 0; i < 256; i++)
            for (int k = 1; k < 8; k++)
                table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    }
    uint32_t crc = ~0u;
    for (; size >= 8; data += 8, size -= 8) { /* eight bytes at once, whatever the byte order */
        crc ^= (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
        crc = table[7][crc & 255] ^ table[6][crc >> 8 & 255] ^ table[5][crc >> 16 & 255] ^ table[4][crc >> 24] ^
              table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
    }
    for (; size; data++, size--)
        crc = crc >> 8 ^ table[0][(crc ^ *data) & 255];
    return ~crc;
}

BOTH_HOT void ring_store(PyObject *object, int64_t number, const void *body)
{
    RingStore *self = (RingStore *)object;
    if (UNLIKELY(self->generation != generation))
        return; /* a forked child: the ring is its parent's */
    ring_write(&self->ring, (uint64_t)number, body, self->crc ? ring_crc32 : NULL);
}

void ring_prefetch(PyObject *object, int64_t n)
{
#if defined(__GNUC__)
    const Ring *ring = &((RingStore *)object)->ring;
    const uint8_t *slot = ring->first + ((uint64_t)n & ring->mask) * ring->slot;
    for (uint64_t at = 0; at < ring->slot; at += CACHE_LINE)
        __builtin_prefetch(slot + at, 1);
    __builtin_prefetch(ring->map + HEAD_AT, 1);
#endif
}

Py_ssize_t ring_body_bytes(PyObject *object) { return (Py_ssize_t)((RingStore *)object)->ring.slot - BODY_AT; }

static PyObject *store_call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *names)
{
    RingStore *self = (RingStore *)object;
    if (PyVectorcall_NARGS(nargsf) != 2 || (names != NULL && PyTuple_GET_SIZE(names))) {
        PyErr_SetString(PyExc_TypeError, "publish(n, record) takes two arguments by position");
        return NULL;
    }
    int64_t n = PyLong_AsLongLong(args[0]);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    Py_buffer record;
    if (PyObject_GetBuffer(args[1], &record, PyBUF_SIMPLE) < 0)
        return NULL;
    bool fits = record.len == (Py_ssize_t)self->ring.slot - BODY_AT;
    if (fits && n >= 0)
        ring_store(object, n, record.buf);
    PyBuffer_Release(&record);
    if (!fits || n < 0) {
        PyErr_SetString(PyExc_ValueError, "kvhook: a record is as long as a slot's body, and has a number from 0");
        return NULL;
    }
    return PyLong_FromLongLong(n + 1);
}

static PyObject *store_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map", "header_bytes", "slot_bytes", "capacity", "crc", NULL};
    PyObject *map;
    Py_ssize_t header, slot, capacity;
    int crc = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Onnn|p", names, &map, &header, &slot, &capacity, &crc))
        return NULL;
    RingStore *self = (RingStore *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (PyObject_GetBuffer(map, &self->map, PyBUF_WRITABLE) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    bool sound = header >= HEAD_AT + 8 && header % 64 == 0 && slot > FIELDS_AT && slot <= 1 << 16 && slot % 64 == 0 &&
                 capacity >= 2 && capacity <= 1 << 22 && (capacity & (capacity - 1)) == 0 &&
                 self->map.len >= header + slot * capacity && (uintptr_t)self->map.buf % 64 == 0;
    if (!sound) {
        Py_DECREF(self);
        PyErr_SetString(PyExc_ValueError, "kvhook: no such ring");
        return NULL;
    }
    self->vectorcall = store_call;
    self->ring.map = self->map.buf;
    self->ring.first = self->ring.map + header;
    self->ring.mask = (uint64_t)capacity - 1;
    self->ring.slot = (uint64_t)slot;
    self->generation = generation;
    self->crc = crc;
    return (PyObject *)self;
}

static void store_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyBuffer_Release(&((RingStore *)object)->map);
    type->tp_free(object);
}

PyTypeObject RingStore_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.RingStore",
    .tp_doc = "RingStore(map, header_bytes, slot_bytes, capacity, crc=False): called as publish(n, record) -> n + 1",
    .tp_basicsize = sizeof(RingStore),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = store_new,
    .tp_dealloc = store_dealloc,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(RingStore, vectorcall),
};
