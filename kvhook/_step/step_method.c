/* StepMethod: what stands in a class in place of LLMEngine.step. It does what `on_step` of kvhook/hooks/wrappers.py
   does behind a wrapt.FunctionWrapper, without that proxy and without a Python frame: it looks up how the engine is
   recorded, reads the clock before and after the original, and publishes what came in between.

   To everybody else it looks like the original function: whatever is read of it is the original's (its name, its
   signature, its class), except what binds it and calls it. */

#include "step.h"

#include <structmember.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original;
    PyObject *steps;  /* id(engine) -> publish: `Registry.steps` */
    PyObject *failed; /* failed(error, id(engine)): publishing has failed; raises if the error is to go on */
    PyObject *unseen; /* unseen(engine) -> publish or None, for an engine that is not in `steps`; NULL once stopped */
} StepMethod;

/* How an engine is recorded: a new reference, or NULL if it is not; with an exception if that is the user's. */
static PyObject *publish_of(StepMethod *self, PyObject *key, PyObject *engine)
{
    PyObject *found = key ? PyDict_GetItemWithError(self->steps, key) : NULL;
    if (LIKELY(found != NULL))
        return Py_NewRef(found);
    PyErr_Clear();
    if (self->unseen == NULL)
        return NULL;
    found = PyObject_CallOneArg(self->unseen, engine);
    if (found == Py_None)
        Py_CLEAR(found);
    return found;
}

HOT static int publish(PyObject *function, int64_t start, int64_t end)
{
    PyObject *publisher = publisher_of(function);
    if (LIKELY(publisher != NULL))
        return publisher_publish(publisher, cell_int(start), cell_int(end));
    PyObject *answer = PyObject_CallFunction(function, "LL", (long long)start, (long long)end);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

HOT static PyObject *step_call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *names)
{
    StepMethod *self = (StepMethod *)object;
    if (UNLIKELY(PyVectorcall_NARGS(nargsf) < 1))
        return PyObject_Vectorcall(self->original, args, nargsf, names);
    Py_INCREF(self); /* the class may be given its original back while it runs */
    PyObject *key = PyLong_FromVoidPtr(args[0]), *function = publish_of(self, key, args[0]);
    if (function == NULL) {
        PyObject *result = PyErr_Occurred() ? NULL : PyObject_Vectorcall(self->original, args, nargsf, names);
        Py_XDECREF(key);
        Py_DECREF(self);
        return result;
    }
    int64_t start = clock_ns();
    PyObject *result = PyObject_Vectorcall(self->original, args, nargsf, names);
    int64_t end = clock_ns();
    PyObject *type = NULL, *error = NULL, *traceback = NULL;
    if (UNLIKELY(result == NULL)) /* the engine's exception: it goes on when its step has been published */
        PyErr_Fetch(&type, &error, &traceback);
    if (UNLIKELY(publish(function, start, end) < 0) && contain(self->failed, key) < 0) {
        Py_CLEAR(result); /* Ctrl-C belongs to the user, also in place of the engine's exception */
        Py_CLEAR(type);
        Py_CLEAR(error);
        Py_CLEAR(traceback);
    }
    if (UNLIKELY(type != NULL))
        PyErr_Restore(type, error, traceback);
    Py_DECREF(self);
    Py_DECREF(function);
    Py_DECREF(key);
    return result;
}

static PyObject *step_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"original", "steps", "failed", "unseen", NULL};
    PyObject *original, *steps, *failed, *unseen;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO!OO", names, &original, &PyDict_Type, &steps, &failed, &unseen))
        return NULL;
    StepMethod *self = (StepMethod *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->vectorcall = step_call;
    self->original = Py_NewRef(original);
    self->steps = Py_NewRef(steps);
    self->failed = Py_NewRef(failed);
    self->unseen = Py_NewRef(unseen);
    return (PyObject *)self;
}

static PyObject *step_bind(PyObject *object, PyObject *instance, PyObject *Py_UNUSED(type))
{
    return instance == NULL || instance == Py_None ? Py_NewRef(object) : PyMethod_New(object, instance);
}

/* From now on it only calls the original: somebody else holds on to it, and kvhook has been taken out. */
static PyObject *step_stop(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    PyObject *none = PyDict_New();
    if (none == NULL)
        return NULL;
    StepMethod *self = (StepMethod *)object;
    PyObject *before = self->steps;
    self->steps = none;
    Py_DECREF(before);
    Py_CLEAR(self->unseen);
    Py_RETURN_NONE;
}

static PyObject *step_getattr(PyObject *object, PyObject *name)
{
    static const char *const own[] = {"__call__", "__get__", "__wrapped__", "kvhook_stop"};
    for (int i = 0; i < 4; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, own[i]) == 0)
            return PyObject_GenericGetAttr(object, name);
    return PyObject_GetAttr(((StepMethod *)object)->original, name);
}

static int step_setattr(PyObject *object, PyObject *name, PyObject *value)
{
    return PyObject_SetAttr(((StepMethod *)object)->original, name, value);
}

static PyObject *step_repr(PyObject *object)
{
    return PyUnicode_FromFormat("<kvhook around %R>", ((StepMethod *)object)->original);
}

static int step_traverse(PyObject *object, visitproc visit, void *arg)
{
    StepMethod *self = (StepMethod *)object;
    Py_VISIT(self->original);
    Py_VISIT(self->steps);
    Py_VISIT(self->failed);
    Py_VISIT(self->unseen);
    return 0;
}

static void step_dealloc(PyObject *object)
{
    StepMethod *self = (StepMethod *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_XDECREF(self->original);
    Py_XDECREF(self->steps);
    Py_XDECREF(self->failed);
    Py_XDECREF(self->unseen);
    type->tp_free(object);
}

static PyMethodDef step_methods[] = {
    {"kvhook_stop", step_stop, METH_NOARGS, "Only call the original from now on."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef step_members[] = {
    {"__wrapped__", T_OBJECT_EX, offsetof(StepMethod, original), READONLY, "the original function"},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject StepMethod_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.StepMethod",
    .tp_doc = "StepMethod(original, steps, failed, unseen): a function in a class, with the step's record around it",
    .tp_basicsize = sizeof(StepMethod),
    .tp_flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_new = step_new,
    .tp_dealloc = step_dealloc,
    .tp_traverse = step_traverse,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(StepMethod, vectorcall),
    .tp_descr_get = step_bind,
    .tp_getattro = step_getattr,
    .tp_setattro = step_setattr,
    .tp_repr = step_repr,
    .tp_members = step_members,
    .tp_methods = step_methods,
};
