/* Errors of kvhook's on the step path: each ends where it is raised, and is told. */

#include "step.h"

int contain(PyObject *failed, PyObject *engine_id)
{
    if (is_users(PyErr_Occurred()))
        return -1;
    PyObject *type, *error, *traceback, *answer = NULL;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    if (failed != NULL) {
        Py_INCREF(failed); /* it takes out of the engine whoever holds it */
        answer = PyObject_CallFunctionObjArgs(failed, error, engine_id, NULL);
        Py_DECREF(failed);
    }
    int result = answer || failed == NULL ? 0 : -1;
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    Py_XDECREF(answer);
    return result;
}
