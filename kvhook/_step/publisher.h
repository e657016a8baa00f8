/* The publisher of one engine: its plan and its state. publish.c runs it, publisher.c makes it and hands over to it. */

#ifndef KVHOOK_PUBLISHER_H
#define KVHOOK_PUBLISHER_H

#include "step.h"

enum { MOST_COLUMNS = 128, MOST_ARGUMENTS = 16 };

/* What is done at the beginning of a step's record: columns are read from vLLM's objects, or set to their blanks. */
typedef enum { SET, SKIP_IF_NONE, SKIP, NUM_STATEMENTS, READ, BLANK } StatementCode;

typedef struct {
    uint16_t code;
    uint16_t reg;    /* the register that is set, or looked at */
    uint16_t source; /* of READ: the register whose attribute it is */
    uint32_t where;  /* the expression, the place, the constant, or the statement to go on with */
} Statement;

/* Where the arguments of `record` or `take` go: registers, or -1 for those that are not kept. */
typedef struct {
    Py_ssize_t count;
    PyObject *names; /* a tuple */
    Py_ssize_t registers[MOST_ARGUMENTS];
} Arguments;

typedef struct {
    PyObject_HEAD
    Program program;
    Cell *registers;
    Py_ssize_t num_registers;
    Statement *statements;
    Py_ssize_t num_statements;
    Series *series;
    Py_ssize_t num_series;
    Py_ssize_t *roots; /* registers of what vLLM hands over */
    Py_ssize_t num_roots;
    /* finished requests: the register of their root (-1: there are none), the expressions of the list and of rows
       (-1: the list's items are the requests), and the registers that an item, or the parts of a row, go to */
    Py_ssize_t finished_root, finished, rows, num_parts;
    Py_ssize_t *parts;
    RecordKind step, request, gone;
    Output output;
    ValuesOut values;
    PyObject *aborted; /* a list */
    PyObject *clock;   /* NULL: the monotonic clock */
    PyObject *on_sample, *orphan, *left, *merge;
    Arguments record, take;
    Py_ssize_t logged;    /* which of the arguments says whether the scheduler's stats were logged; -1: none */
    Py_ssize_t uncounted; /* register: outputs were not counted if there are some while it is None; -1: not known */
    bool from_core;
    int64_t measure_every;
} Publisher;

/* What a publisher is made of. */
typedef struct {
    PyObject *plan, *publish, *clock, *on_sample, *orphan, *left, *start[3];
    int engine;
} Given;

int publisher_fill(Publisher *self, const Given *given); /* publisher_plan.c */
void publisher_free(Publisher *self);
void publisher_prefetch(const Publisher *self);
int publish_step(Publisher *self, Cell t_start_ns, Cell t_end_ns);
Cell publisher_clock(const Publisher *self);
Cell publisher_uncounted(const Publisher *self);

#endif
