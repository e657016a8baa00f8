/* What the files of kvhook._step.native share. Each file's own comment says what it holds. */

#ifndef KVHOOK_STEP_H
#define KVHOOK_STEP_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "ring_protocol.h"

#if defined(__GNUC__)
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define LIKELY(x) (x)
#define UNLIKELY(x) (x)
#endif

/* Record kinds, as in kvhook/schema.py and kvhook/core_schema.py; a test compares them. */
enum { KIND_STEP = 1, KIND_REQUEST = 2, KIND_VALUES = 3, KIND_CORE_STEP = 16 };

/* What runs in every step lies together, so that it can be fetched together: see publisher_prefetch in publish.c. HOT is
   the front end's, CORE_HOT the engine core's, BOTH_HOT what both run. */
#if defined(__GNUC__) && defined(__linux__)
#define HOT __attribute__((section("kvhook_hot")))
#define CORE_HOT __attribute__((section("kvhook_core")))
#define BOTH_HOT __attribute__((section("kvhook_both")))
#define HAVE_HOT 1
extern const char __start_kvhook_hot[] __attribute__((visibility("hidden"))); /* made by the linker */
extern const char __stop_kvhook_hot[] __attribute__((visibility("hidden")));
extern const char __start_kvhook_core[] __attribute__((visibility("hidden")));
extern const char __stop_kvhook_core[] __attribute__((visibility("hidden")));
extern const char __start_kvhook_both[] __attribute__((visibility("hidden")));
extern const char __stop_kvhook_both[] __attribute__((visibility("hidden")));
#else
#define HOT
#define CORE_HOT
#define BOTH_HOT
#define HAVE_HOT 0
#endif

enum { CACHE_LINE = 64 };

static inline void prefetch(const void *from, size_t size)
{
#if defined(__GNUC__)
    for (const char *at = from, *end = at + size; at < end; at += CACHE_LINE)
        __builtin_prefetch(at);
#else
    (void)from, (void)size;
#endif
}

static inline void prefetch_code(void)
{
#if HAVE_HOT
    prefetch(__start_kvhook_hot, (size_t)(__stop_kvhook_hot - __start_kvhook_hot));
    prefetch(__start_kvhook_both, (size_t)(__stop_kvhook_both - __start_kvhook_both));
#endif
}

static inline void prefetch_core_code(void)
{
#if HAVE_HOT
    prefetch(__start_kvhook_core, (size_t)(__stop_kvhook_core - __start_kvhook_core));
    prefetch(__start_kvhook_both, (size_t)(__stop_kvhook_both - __start_kvhook_both));
#endif
}

/* Ctrl-C and sys.exit() belong to the user: `USERS` of kvhook/faults.py. */
static inline bool is_users(PyObject *type)
{
    return PyErr_GivenExceptionMatches(type, PyExc_KeyboardInterrupt) ||
           PyErr_GivenExceptionMatches(type, PyExc_SystemExit);
}

/* Whether the error that is set belongs to the user: `is_users` of kvhook/faults.py, which knows what a signal handler
   has raised. Every other error ends in kvhook. contain.c */
bool is_users_error(void);

/* An error is set, and is kvhook's unless `is_users_error`: call failed(error), or failed(error, engine_id) where that is not NULL. 0 if the error
   ends here, -1 with an exception set if it does not. Without `failed`, which whoever is being deleted has not any more,
   it is told to nobody. contain.c */
int contain(PyObject *failed, PyObject *engine_id);

static inline int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* the clock of time.monotonic_ns */
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- cells: cell.c ------------------------------------------------------------------------------------------- */

/* A Python value. Plain ints that fit into 64 bits and plain floats are held as numbers; everything else, bools and
   numbers of other classes among it, stays the object that it was, so that Python's own rules are applied to it. */
typedef enum { EMPTY, INTEGER, FLOAT, OBJECT } Tag;

typedef struct {
    Tag tag;
    union {
        int64_t i;
        double d;
        PyObject *o; /* owned */
    };
} Cell;

static inline Cell cell_int(int64_t value)
{
    Cell cell = {INTEGER, {.i = value}};
    return cell;
}

static inline Cell cell_float(double value)
{
    Cell cell = {FLOAT, {.d = value}};
    return cell;
}

void cell_drop(PyObject *object); /* Py_DECREF, in one place: what is repeated in every step is short */

static inline void cell_clear(Cell *cell)
{
    if (cell->tag == OBJECT) {
        PyObject *object = cell->o;
        cell->tag = EMPTY;
        cell_drop(object);
    }
}

/* Put a value into a cell that may hold another. What is let go of may run code: it goes last. */
static inline void cell_set(Cell *cell, Cell value)
{
    Cell old = *cell;
    *cell = value;
    cell_clear(&old);
}

static inline Cell cell_copy(Cell cell)
{
    if (cell.tag == OBJECT)
        Py_INCREF(cell.o);
    return cell;
}

static inline bool cell_is_none(Cell cell) { return cell.tag == OBJECT && cell.o == Py_None; }

Cell cell_take(PyObject *object);          /* takes over the reference; an EMPTY cell for NULL */
Cell cell_borrow(PyObject *object);        /* leaves the caller its reference */
PyObject *cell_object(Cell cell);          /* a new reference, NULL with an exception set */
int cell_true(Cell cell);                  /* as bool(); -1 with an exception set */
Cell cell_arithmetic(char operator, Cell a, Cell b); /* + - * /; borrows both; EMPTY with an exception set */
int cell_compare(int operator, Cell a, Cell b);      /* Py_GE and so on; -1 with an exception set */
Cell cell_to_int(Cell cell, PyObject *int_type);     /* int(x); EMPTY with an exception set */

/* ---- places: place.c ----------------------------------------------------------------------------------------- */

typedef enum { ASKED, SLOT, VALUE } PlaceKind;

/* One attribute, and where it is in the objects of the class that was seen last. */
typedef struct {
    PyTypeObject *type; /* not owned; compared only, together with its version */
    PyObject *name;     /* interned, kept alive by whoever has the place */
    PyObject *of_class; /* the class's own value, for objects that have none; not owned */
    unsigned version;
    PlaceKind kind : 8;
    int32_t where : 24;
} Place;

int place_begin(Place *place, const char *name); /* a place that is not known yet, with a name of its own */
PyObject *place_read(Place *place, PyObject *object); /* a new reference; NULL with an exception set */
const PyObject *place_glance(const Place *place, PyObject *object); /* fetches ahead; borrowed, or NULL */
Cell place_cell(Place *place, Cell owner);            /* EMPTY with an exception set */

/* ---- programs: program.c ------------------------------------------------------------------------------------- */

/* What an expression of an adapter's table is compiled to, by kvhook/adapters/program.py. A stack machine. */
#define OPERATIONS(X)                                                                                                  \
    X(REGISTER) X(CONSTANT) X(ATTRIBUTE) X(REGISTER_ATTRIBUTE) X(ADD) X(SUBTRACT) X(MULTIPLY) X(DIVIDE) X(INT) X(LEN)  \
    X(CALL) X(IS_NONE) X(IS_NOT_NONE) X(COMPARE) X(JUMP_IF_FALSE) X(JUMP) X(END)

#define AS_ENUM(name) OP_##name,
enum { OPERATIONS(AS_ENUM) NUM_OPERATIONS };

typedef struct {
    uint16_t code;
    uint16_t argument; /* a register, a constant, a comparison, a number of arguments, or where to jump */
    uint32_t place;    /* of ATTRIBUTE and REGISTER_ATTRIBUTE */
} Operation;

/* The registers that C knows by name; behind them come the table's own. */
#define STATE_REGISTERS(X)                                                                                             \
    X(n) X(step) X(request_number) X(pending) X(engine_index) X(spent_ns) X(num_added_reqs) X(scheduler_stats_logged)  \
    X(num_outputs) X(kvhook_ns) X(vllm_stats_ns) X(num_free_kv_blocks) X(num_aborted_reqs) X(t_start_ns) X(t_end_ns)   \
    X(finished) X(gone)

#define AS_REGISTER(name) REG_##name,
enum { STATE_REGISTERS(AS_REGISTER) NUM_STATE_REGISTERS };

enum { STACK_DEPTH = 32 };

typedef struct {
    Operation *operations; /* of all expressions, one behind the other */
    Py_ssize_t num_operations;
    Cell *constants;
    Py_ssize_t num_constants;
    Place *places; /* one for each operation that reads an attribute */
    Py_ssize_t num_places;
} Program;

int program_parse(Program *program, PyObject *operations, PyObject *constants, Py_ssize_t num_registers);
void program_clear(Program *program);
int program_visit(const Program *program, visitproc visit, void *arg);
/* Evaluate the expression that begins there; EMPTY with an exception set. */
Cell program_run(const Program *program, Py_ssize_t start, const Cell *registers);

/* ---- the ring: ring_store.c ---------------------------------------------------------------------------------- */

extern PyTypeObject RingStore_Type;
/* Store a body of the ring's length as record n. */
void ring_store(PyObject *store, int64_t n, const void *body);
Py_ssize_t ring_body_bytes(PyObject *store);
void ring_prefetch(PyObject *store, int64_t n); /* what storing record n will touch */
PyObject *ring_forked(PyObject *module, PyObject *nothing);
uint32_t ring_crc32(const uint8_t *data, size_t size);

/* ---- packing: packing.c -------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *publish;  /* publish(n, record) -> n + 1; a RingStore is not called, its function is */
    bool native;        /* whether it is one */
    uint8_t *body;      /* where a record is put together */
    Py_ssize_t size;    /* of it in bytes */
    int32_t engine;
} Output;

/* Where a column comes from; then one kind of record: its code, its columns, and Python's packer for what C does not
   pack. */
typedef enum { OF_REGISTER, OF_CONSTANT, COMPUTED } ColumnSource;

typedef struct {
    uint32_t source : 2;
    uint32_t where : 30; /* the register, the constant, or the expression */
} Column;

typedef struct {
    int32_t kind;
    Py_ssize_t count;
    Column *columns;
    char *types; /* q or d */
    PyObject *pack;
} RecordKind;

/* Each stores one record and counts n up; -1 with an exception set, n as it was. */
int put_record(Output *output, const RecordKind *kind, Cell *n, const Cell *const *cells);
int put_values(Output *output, Cell *n, Cell step, int64_t series, const double *values, Py_ssize_t count,
               Py_ssize_t room);
int put_value_objects(Output *output, PyObject *pack, Cell *n, Cell step, int64_t series, PyObject *values,
                      Py_ssize_t room);

/* Put a record of integers together in `output->body`, of which there are as many as fit; then store what is there. */
void put_columns(Output *output, int32_t kind, int64_t n, const int64_t *columns, Py_ssize_t count);
int put_body(Output *output, Cell *n);

/* ---- lists of values: list_stats.c --------------------------------------------------------------------------- */

typedef struct {
    int64_t series;
    Py_ssize_t root, program; /* the register that may be None, and what gives the list */
    Py_ssize_t count, sum, min, max; /* registers */
} Series;

typedef struct {
    Output *output;
    PyObject *pack;
    Py_ssize_t room; /* values in a slot */
} ValuesOut;

int list_stats(const Series *series, PyObject *values, Cell *registers, const ValuesOut *out);

/* ---- types ---------------------------------------------------------------------------------------------------- */

extern PyTypeObject Publisher_Type;
/* Publish a step with these clocks, without making Python objects of them; -1 with an exception set. */
int publisher_publish(PyObject *publisher, Cell t_start_ns, Cell t_end_ns);
/* The publisher whose `publish` this bound method is, borrowed; NULL if it is something else. */
PyObject *publisher_of(PyObject *callable);

extern PyTypeObject StepMethod_Type;
extern PyTypeObject Counter_Type;
extern PyTypeObject OutputTap_Type;
extern PyTypeObject CoreState_Type;
extern PyTypeObject CoreTap_Type;
/* CoreTap(role, original, state): in place of a method inside the engine core. */

#endif
