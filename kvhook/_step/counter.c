/* Counter: counts the outputs of a step at level light, as `count` of kvhook/adapters/light.py does.

   A step has an output per request, so what is read of one is read up to some thousand times: where it is in the
   objects of its class is looked up once, see place.c. */

#include "step.h"

#include <structmember.h>

/* So many outputs are fetched ahead of being counted; each takes some six lines of a cache. */
#define AT_ONCE 32

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *preempted;  /* an event of this type says that a request was preempted */
    PyObject *add_prompt; /* add_prompt(counts, output, state), for a request whose prompt is computed */
    Place request_id, new_token_ids, events, is_prefilling;
} Counter;

static PyObject *names[4]; /* get, type, num_preempted_reqs, num_generation_tokens */

static int find_names(void)
{
    static const char *const texts[] = {"get", "type", "num_preempted_reqs", "num_generation_tokens"};
    for (int i = 0; i < 4; i++)
        if (names[i] == NULL && (names[i] = PyUnicode_InternFromString(texts[i])) == NULL)
            return -1;
    return 0;
}

/* counts.name += more */
static int add_to(PyObject *counts, PyObject *name, int64_t more)
{
    PyObject *before = PyObject_GetAttr(counts, name), *addend = before ? PyLong_FromLongLong(more) : NULL;
    PyObject *after = addend ? PyNumber_InPlaceAdd(before, addend) : NULL;
    int result = after ? PyObject_SetAttr(counts, name, after) : -1;
    Py_XDECREF(before);
    Py_XDECREF(addend);
    Py_XDECREF(after);
    return result;
}

static int count_events(Counter *self, PyObject *events, PyObject *counts)
{
    PyObject *iterator = PyObject_GetIter(events), *event;
    int result = iterator ? 0 : -1;
    while (result == 0 && (event = PyIter_Next(iterator)) != NULL) {
        PyObject *type = PyObject_GetAttr(event, names[1]);
        PyObject *alike = type ? PyObject_RichCompare(type, self->preempted, Py_EQ) : NULL;
        result = alike ? PyObject_IsTrue(alike) : -1;
        if (result > 0)
            result = add_to(counts, names[2], 1);
        Py_XDECREF(type);
        Py_XDECREF(alike);
        Py_DECREF(event);
    }
    Py_XDECREF(iterator);
    return result == 0 && PyErr_Occurred() ? -1 : result;
}

/* The state of the request that an output is for: a new reference to it, or to None. */
HOT static PyObject *state_of(Counter *self, PyObject *output, PyObject *states)
{
    PyObject *request_id = place_read(&self->request_id, output), *state;
    if (request_id == NULL)
        return NULL;
    if (LIKELY(PyDict_CheckExact(states))) {
        state = PyDict_GetItemWithError(states, request_id);
        if (state == NULL && !PyErr_Occurred())
            state = Py_None;
        Py_XINCREF(state);
    }
    else
        state = PyObject_CallMethodObjArgs(states, names[0], request_id, NULL);
    Py_DECREF(request_id);
    return state;
}

/* One output and its request's state, which is taken over; its tokens are added to `generated`. */
HOT static int count_one(Counter *self, PyObject *output, PyObject *state, PyObject *counts, int64_t *generated)
{
    PyObject *found = NULL;
    int result = -1;
    if (state == NULL || state == Py_None) { /* aborted meanwhile: vLLM passes it over as well */
        Py_XDECREF(state);
        return state ? 0 : -1;
    }
    if ((found = place_read(&self->new_token_ids, output)) == NULL)
        goto done;
    Py_ssize_t size = LIKELY(PyList_CheckExact(found)) ? PyList_GET_SIZE(found) : PyObject_Size(found);
    if (size < 0)
        goto done;
    *generated += size;
    Py_SETREF(found, place_read(&self->is_prefilling, state));
    int prefilling = found == Py_False ? 0 : found ? PyObject_IsTrue(found) : -1;
    if (prefilling < 0)
        goto done;
    if (prefilling) {
        Py_SETREF(found, PyObject_CallFunctionObjArgs(self->add_prompt, counts, output, state, NULL));
        if (found == NULL)
            goto done;
    }
    Py_SETREF(found, place_read(&self->events, output));
    if (found != NULL)
        result = found == Py_None ? 0 : count_events(self, found, counts);
done:
    Py_XDECREF(found);
    Py_DECREF(state);
    return result;
}

/* Outputs, from the first of them on. After a forward pass each lies in memory, in some ten places that lead from one to
   the next, and to wait for one after the other takes longer than all the rest. So each place is fetched for all of them
   before it is read of any: see the figures in benchmarks/RESULTS.md. */
HOT static int count_some(Counter *self, PyObject **some, Py_ssize_t size, PyObject *states, PyObject *counts,
                          int64_t *generated)
{
    PyObject *found[AT_ONCE];
    Py_ssize_t i;
    int result = 0;
    for (i = 0; i < size; i++)
        prefetch(some[i], 2 * CACHE_LINE);
    for (i = 0; i < size; i++) {
        prefetch(place_glance(&self->request_id, some[i]), 2 * CACHE_LINE);
        __builtin_prefetch(place_glance(&self->new_token_ids, some[i]));
    }
    for (i = 0; i < size && PyDict_CheckExact(states); i++) { /* of another mapping `get` may do anything */
        if ((found[i] = state_of(self, some[i], states)) == NULL) {
            PyErr_Clear(); /* it is raised again when it is its turn */
            break;
        }
        prefetch((char *)found[i] - CACHE_LINE / 2, CACHE_LINE);
    }
    Py_ssize_t looked_up = i;
    for (i = 0; i < looked_up; i++)
        place_glance(&self->is_prefilling, found[i]);
    for (i = 0; result == 0 && i < size; i++)
        result = count_one(self, some[i], i < looked_up ? found[i] : state_of(self, some[i], states), counts,
                           generated);
    for (; i < looked_up; i++)
        Py_DECREF(found[i]);
    return result;
}

HOT static PyObject *counter_call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *keywords)
{
    Counter *self = (Counter *)object;
    if (PyVectorcall_NARGS(nargsf) != 3 || (keywords != NULL && PyTuple_GET_SIZE(keywords))) {
        PyErr_SetString(PyExc_TypeError, "count(outputs, states, counts) takes three arguments by position");
        return NULL;
    }
    PyObject *outputs = args[0], *states = args[1], *counts = args[2], *iterator = NULL, *output;
    int64_t generated = 0;
    int result = 0;
    if (LIKELY(PyList_CheckExact(outputs))) {
        PyObject *some[AT_ONCE];
        Py_ssize_t first = 0, size;
        while (result == 0 && (size = PyList_GET_SIZE(outputs) - first) > 0) {
            size = size < AT_ONCE ? size : AT_ONCE;
            for (Py_ssize_t i = 0; i < size; i++)
                some[i] = Py_NewRef(PyList_GET_ITEM(outputs, first + i)); /* what is called may change the list */
            result = count_some(self, some, size, states, counts, &generated);
            for (Py_ssize_t i = 0; i < size; i++)
                Py_DECREF(some[i]);
            first += size;
        }
    }
    else {
        iterator = PyObject_GetIter(outputs);
        result = iterator ? 0 : -1;
        while (result == 0 && (output = PyIter_Next(iterator)) != NULL) {
            result = count_one(self, output, state_of(self, output, states), counts, &generated);
            Py_DECREF(output);
        }
        Py_XDECREF(iterator);
        if (result == 0 && PyErr_Occurred())
            result = -1;
    }
    if (result < 0 || add_to(counts, names[3], generated) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *counter_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"preempted", "add_prompt", NULL};
    static const char *const attributes[] = {"request_id", "new_token_ids", "events", "is_prefilling"};
    PyObject *preempted, *add_prompt;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", keywords, &preempted, &add_prompt) || find_names() < 0)
        return NULL;
    Counter *self = (Counter *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->vectorcall = counter_call;
    self->preempted = Py_NewRef(preempted);
    self->add_prompt = Py_NewRef(add_prompt);
    Place *places[] = {&self->request_id, &self->new_token_ids, &self->events, &self->is_prefilling};
    for (int i = 0; i < 4; i++)
        if (place_begin(places[i], attributes[i]) < 0) {
            Py_DECREF(self);
            return NULL;
        }
    return (PyObject *)self;
}

static void counter_dealloc(PyObject *object)
{
    Counter *self = (Counter *)object;
    Py_XDECREF(self->preempted);
    Py_XDECREF(self->add_prompt);
    Py_XDECREF(self->request_id.name);
    Py_XDECREF(self->new_token_ids.name);
    Py_XDECREF(self->events.name);
    Py_XDECREF(self->is_prefilling.name);
    Py_TYPE(object)->tp_free(object);
}

PyTypeObject Counter_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.Counter",
    .tp_doc = "Counter(preempted, add_prompt): called as count(outputs, states, counts)",
    .tp_basicsize = sizeof(Counter),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = counter_new,
    .tp_dealloc = counter_dealloc,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Counter, vectorcall),
};
