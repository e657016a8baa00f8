/* Where an attribute of an object is, looked up once for a class and again when the class has changed: what the
   interpreter's own inline caches do for Python code.

   After a forward pass nothing of this is in the processor's caches, and what counts is how many places of memory are
   touched. Asking a class for an attribute touches its name, an entry of the interpreter's cache of methods, the
   class, and the keys that its objects share: 5 places. A place that is known is 2: the class's version, the value.

   Two kinds of places are known: a slot (a class with __slots__, a msgspec Struct), which is reached by public means,
   and an entry of the values that an object of an ordinary class keeps in place of a dictionary. The latter is CPython's
   own affair and differs between its versions: it is done for 3.11 and 3.12, on which it is tested; elsewhere, and for
   any object that is not as expected, the attribute is asked for. */

#define Py_BUILD_CORE_MODULE 1
#include "step.h"

#include <structmember.h>

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030D0000 && !defined(Py_GIL_DISABLED)
#define HAVE_VALUES 1
#include <internal/pycore_dict.h>
#include <internal/pycore_object.h>
#else
#define HAVE_VALUES 0
#endif

static unsigned version_of(PyTypeObject *type)
{
#if PY_VERSION_HEX < 0x030C0000
    if (!(type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG))
        return 0;
#endif
    return type->tp_version_tag; /* 0 after a change, and another number later on */
}

#if HAVE_VALUES
/* The values of an object without a dictionary of its own; NULL where it has one. */
static inline PyObject **values_of(PyObject *object)
{
#if PY_VERSION_HEX < 0x030C0000
    PyDictValues *values = *_PyObject_ValuesPointer(object);
    return values ? values->values : NULL;
#else
    PyDictOrValues values = *_PyObject_DictOrValuesPointer(object);
    return _PyDictOrValues_IsValues(values) ? _PyDictOrValues_GetValues(values)->values : NULL;
#endif
}

/* The index of a name among the keys that a class's objects share; -1 if it is not one of them. */
static int32_t index_of(PyTypeObject *type, PyObject *name)
{
    if (!(type->tp_flags & Py_TPFLAGS_HEAPTYPE) || !(type->tp_flags & Py_TPFLAGS_MANAGED_DICT))
        return -1;
    PyDictKeysObject *keys = ((PyHeapTypeObject *)type)->ht_cached_keys;
    if (keys == NULL || keys->dk_kind == DICT_KEYS_GENERAL)
        return -1;
    PyDictUnicodeEntry *entries = DK_UNICODE_ENTRIES(keys);
    for (Py_ssize_t i = 0; i < keys->dk_nentries; i++)
        if (entries[i].me_key == name) /* both are interned */
            return (int32_t)i;
    return -1;
}
#endif

static void find_place(Place *place, PyTypeObject *type)
{
    place->kind = ASKED;
    place->of_class = NULL;
    PyObject *found = PyObject_GetAttr((PyObject *)type, place->name); /* gives the class a version, if it has none */
    if (found == NULL)
        PyErr_Clear();
    if (type->tp_getattro != PyObject_GenericGetAttr)
        ; /* it has an opinion of its own on what its attributes are */
    else if (found != NULL && Py_IS_TYPE(found, &PyMemberDescr_Type)) {
        PyMemberDescrObject *member = (PyMemberDescrObject *)found;
        if (member->d_member->type == T_OBJECT_EX && PyType_IsSubtype(type, PyDescr_TYPE(member))) {
            place->kind = SLOT;
            place->where = (int32_t)member->d_member->offset;
        }
    }
#if HAVE_VALUES
    else {
        /* looked up in the class itself: `found` may be its metaclass's, or what a descriptor's __get__ has given */
        PyObject *there = _PyType_Lookup(type, place->name);
        if (there == NULL || Py_TYPE(there)->tp_descr_set == NULL) {
            place->where = index_of(type, place->name);
            if (place->where >= 0)
                place->kind = VALUE;
            if (there != NULL && Py_TYPE(there)->tp_descr_get == NULL)
                place->of_class = there; /* it stays alive as long as the class does not change */
        }
    }
#endif
    Py_XDECREF(found);
    place->type = type;
    place->version = version_of(type);
    if (place->version == 0)
        place->type = NULL; /* it could not be told when it changes */
}

/* The value at its place, borrowed; NULL, without an exception, if it must be asked for. */
static inline PyObject *at_place(Place *place, PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (UNLIKELY(type != place->type || version_of(type) != place->version))
        find_place(place, type);
    if (place->kind == SLOT)
        return *(PyObject **)((char *)object + place->where);
#if HAVE_VALUES
    if (place->kind == VALUE) {
        PyObject **values = values_of(object);
        if (values == NULL)
            return NULL;
        PyObject *value = values[place->where];
        return value ? value : place->of_class;
    }
#endif
    return NULL;
}

int place_begin(Place *place, const char *name)
{
    memset(place, 0, sizeof *place);
    place->name = PyUnicode_InternFromString(name);
    return place->name ? 0 : -1;
}

/* Have fetched what reading this attribute will touch, where its place is known; nothing else happens. The object
   itself must have been fetched. Returns what stands there, borrowed, which is not to be kept: only to be fetched. */
BOTH_HOT const PyObject *place_glance(const Place *place, PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (UNLIKELY(type != place->type || version_of(type) != place->version))
        return NULL;
    if (place->kind == SLOT)
        return *(PyObject **)((char *)object + place->where);
#if HAVE_VALUES
    if (place->kind == VALUE) {
        PyObject **values = values_of(object);
        if (values != NULL)
            __builtin_prefetch(values + place->where);
    }
#endif
    return NULL;
}

BOTH_HOT PyObject *place_read(Place *place, PyObject *object)
{
    PyObject *value = at_place(place, object);
    return LIKELY(value != NULL) ? Py_NewRef(value) : PyObject_GetAttr(object, place->name);
}

BOTH_HOT Cell place_cell(Place *place, Cell owner)
{
    PyObject *object = cell_object(owner); /* what is called here may take it out of its register */
    if (object == NULL)
        return (Cell){EMPTY, {.o = NULL}};
    PyObject *value = at_place(place, object);
    Cell cell = LIKELY(value != NULL) ? cell_borrow(value) : cell_take(PyObject_GetAttr(object, place->name));
    Py_DECREF(object);
    return cell;
}
