/* A team: the calling thread, and helpers of the process that are free.

   OpenMP's teams were given up for what they do to the process around them: a team that crossed a fork hangs, each
   calling thread gets a pool of its own, idle threads spin for milliseconds, a call waits for every thread of its team
   to be scheduled (16 ms instead of 5 us where other processes want the processors), and a thread that cannot be started
   ends the process. Here the work lies in shares that whoever comes first takes. The caller never waits for a helper to
   come, only for shares that are being worked on, and for helpers that have come and look for one (which takes less than
   a microsecond, unless they lose their processor just then); those that do not come, or have died in a fork, are not
   missed. */
#ifndef CYBN_TEAM_H
#define CYBN_TEAM_H

typedef void (*cybn_work)(void *context, Py_ssize_t step, Py_ssize_t share);

/* The share that who has this place, of so many, tries as number i of a step: first those of its place, so that it finds in
   its caches what it had in the step before; then what others come to last. `back`: from the last one to the first, where a
   step goes over what the one before has left in the caches. */
static Py_ssize_t cybn_share_at(Py_ssize_t i, Py_ssize_t place, Py_ssize_t places, Py_ssize_t shares, int back) {
    const Py_ssize_t first = place * shares / places, end = (place + 1) * shares / places, own = end - first;
    const Py_ssize_t share = back ? (i < own ? end - 1 - i : first + i) : (i < own ? first + i : end - 1 - i);
    return share < 0 ? share + shares : share < shares ? share : share - shares;
}

/* What the work is worth: helpers that are awake; waking some if calls follow each other closely; waking them anyway; and
   having them compete with other processes. */
enum { CYBN_AWAKE, CYBN_CLOSE, CYBN_WAKE, CYBN_COMPETE };

enum {
    CYBN_MOST_SHARES = 1024,        /* (and 255 steps) */
    CYBN_SPIN = 50 * 1000,          /* ns for which a helper looks for work before it sleeps; waking up takes as long */
    CYBN_SPIN_MOST = 1000 * 1000,   /* up to this, a quarter of what its last work took: the larger the results, the longer
                                       the system takes to free and to find their memory, between two calls of a loop */
    CYBN_STEP_SPIN = 1000 * 1000,   /* ns for which who is done with a step looks whether the others are */
    CYBN_LOST = 2 * 1000 * 1000,    /* ns without a processor, in the middle of work, that tell that others want it */
    CYBN_AWAY = 1000 * 1000,        /* ns for which a helper stays away then; twice as long each time that follows, */
    CYBN_AWAY_MOST = 64 * 1000 * 1000   /* up to this */
};

/* Every `back`-th step goes back; 0: none. */
static int cybn_goes_back(Py_ssize_t step, Py_ssize_t back) { return back > 0 && (step + 1) % back == 0; }

static void cybn_alone(cybn_work work, void *context, Py_ssize_t steps, Py_ssize_t shares, Py_ssize_t back) {
    Py_ssize_t step, i;
    for (step = 0; step < steps; step++)
        for (i = 0; i < shares; i++) work(context, step, cybn_share_at(i, 0, 1, shares, cybn_goes_back(step, back)));
}

#if defined(_WIN32)
/* No helpers yet. */
static int cybn_prepare_team(void) { return 0; }
static int cybn_helpers(void) { return 0; }
static long cybn_helped(void) { return 0; }
static void cybn_team(cybn_work work, void *context, Py_ssize_t steps, Py_ssize_t shares, Py_ssize_t back, int threads,
                      int worth) {
    (void)threads; (void)worth;
    cybn_alone(work, context, steps, shares, back);
}
#else
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#define CYBN_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define CYBN_PAUSE() __asm__ __volatile__("isb")
#else
#define CYBN_PAUSE() ((void)0)
#endif

typedef struct cybn_task {
    struct cybn_task *next;
    cybn_work work;
    void *context;
    Py_ssize_t steps, shares, back;
    Py_ssize_t done;        /* shares, over all steps (atomic) */
    pthread_t caller;
    int processor;          /* where the caller is */
    int worth;
    int helpers;            /* wished for */
    int room;               /* helpers that may still come (under the lock) */
    int inside;             /* helpers that came and have not left (atomic; grows under the lock only) */
    unsigned char taken[CYBN_MOST_SHARES];  /* the steps in which the share was taken (atomic) */
} cybn_task;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wanted, finished;
    cybn_task *tasks;
    int room;               /* of all tasks (atomic; changes under the lock) */
    int helpers;            /* threads that were started (atomic; changes under the lock) */
    int away;               /* those that stay away for a while (atomic) */
    long long ended;        /* when the last call ended (atomic) */
    long helped;            /* how often one took part (atomic) */
    int idle;               /* those that look for work and do not sleep (atomic) */
    int sleepers;           /* who waits in `finished` (atomic) */
} cybn_pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0, 0, 0, 0, 0, 0};

#define CYBN_LOAD(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define CYBN_ADD(p, n) __atomic_add_fetch(p, n, __ATOMIC_SEQ_CST)

static long long cybn_clock(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long cybn_now(void) { return cybn_clock(CLOCK_MONOTONIC); }

typedef struct {
    int pauses;
    long long ns, end;
} cybn_patience;

/* A pause; whether to go on spinning. */
static int cybn_spin(cybn_patience *patience) {
    CYBN_PAUSE();
    if (++patience->pauses % 32) return 1;
    if (patience->end == 0) patience->end = cybn_now() + patience->ns;
    return cybn_now() < patience->end;
}

/* After a task's `done` or `inside` has changed: who sleeps for it must look. (It counts itself first and looks then; here
   it is the other way round, so one of the two sees the other.) */
static void cybn_tell(void) {
    if (CYBN_LOAD(&cybn_pool.sleepers)) {
        pthread_mutex_lock(&cybn_pool.lock);
        pthread_cond_broadcast(&cybn_pool.finished);
        pthread_mutex_unlock(&cybn_pool.lock);
    }
}

static int cybn_reached(const cybn_task *task, Py_ssize_t done) {
    return done < 0 ? CYBN_LOAD(&task->inside) == 0 : CYBN_LOAD(&task->done) >= done;
}

/* Until so many shares are done; -1: until no helper is inside. */
static void cybn_await(const cybn_task *task, Py_ssize_t done) {
    cybn_patience patience = {0, CYBN_STEP_SPIN, 0};
    while (!cybn_reached(task, done)) {
        if (cybn_spin(&patience)) continue;
        pthread_mutex_lock(&cybn_pool.lock);
        CYBN_ADD(&cybn_pool.sleepers, 1);
        while (!cybn_reached(task, done)) pthread_cond_wait(&cybn_pool.finished, &cybn_pool.lock);
        CYBN_ADD(&cybn_pool.sleepers, -1);
        pthread_mutex_unlock(&cybn_pool.lock);
    }
}

/* All steps, each when the one before is done. */
static void cybn_take_part(cybn_task *task, Py_ssize_t place) {
    const Py_ssize_t places = task->helpers + 1, shares = task->shares;
    Py_ssize_t step, i, share;
    for (step = 0; step < task->steps; step++) {
        const int back = cybn_goes_back(step, task->back);
        for (i = 0; i < shares; i++) {
            unsigned char before = (unsigned char)step;
            share = cybn_share_at(i, place, places, shares, back);
            if (__atomic_load_n(&task->taken[share], __ATOMIC_RELAXED) != before
                || !__atomic_compare_exchange_n(&task->taken[share], &before, (unsigned char)(step + 1), 0,
                                                __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                continue;
            task->work(task->context, step, share);
            CYBN_ADD(&task->done, 1);
            cybn_tell();
        }
        cybn_await(task, (step + 1) * shares);
    }
}

/* A task with room, and a place in it; under the lock. */
static cybn_task *cybn_enter(void) {
    cybn_task *task;
    for (task = cybn_pool.tasks; task != NULL; task = task->next) {
        if (task->room > 0 && CYBN_LOAD(&task->done) < task->steps * task->shares) {
            task->room--;
            CYBN_ADD(&cybn_pool.room, -1);
            CYBN_ADD(&task->inside, 1);
            CYBN_ADD(&cybn_pool.idle, -1);
            return task;
        }
    }
    return NULL;
}

/* The next task, spinning for so many ns and sleeping then. */
static cybn_task *cybn_next(long long ns) {
    cybn_task *task = NULL;
    cybn_patience patience = {0, ns, 0};
    int spinning = ns > 0;
    while (task == NULL) {
        spinning = spinning && cybn_spin(&patience);
        if (spinning && CYBN_LOAD(&cybn_pool.room) == 0) continue;
        pthread_mutex_lock(&cybn_pool.lock);
        task = cybn_enter();
        while (task == NULL && !spinning) {
            CYBN_ADD(&cybn_pool.idle, -1);
            pthread_cond_wait(&cybn_pool.wanted, &cybn_pool.lock);
            CYBN_ADD(&cybn_pool.idle, 1);
            task = cybn_enter();
        }
        pthread_mutex_unlock(&cybn_pool.lock);
    }
    return task;
}

#if defined(__linux__)
static int cybn_processor(void) { return sched_getcpu(); }

/* A helper that wakes up on the caller's processor would take the caller's time, and sleep again before the system thinks
   of moving it. It moves itself, to where the caller may run and is not. Whether that could be done. */
static int cybn_make_way(const cybn_task *task) {
    cpu_set_t others;
    if (cybn_processor() != task->processor) return 1;
    if (pthread_getaffinity_np(task->caller, sizeof others, &others) != 0) return 0;
    CPU_CLR(task->processor, &others);
    return CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0;
}

/* How often other threads have taken this one's processor. */
static long cybn_interruptions(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}
#else
static int cybn_processor(void) { return -1; }
static int cybn_make_way(const cybn_task *task) { (void)task; return 1; }
static long cybn_interruptions(void) { return 0; }
#endif

/* Between other processes a helper gets its turn, loses it in the middle of a share, and has the caller wait for
   milliseconds. Who has lost time so stays away for a while; the longer, the more often. */
static void cybn_stay_away(long long ns) {
    struct timespec pause = {0, ns};
    CYBN_ADD(&cybn_pool.away, 1);
    CYBN_ADD(&cybn_pool.idle, -1);
    nanosleep(&pause, NULL);
    CYBN_ADD(&cybn_pool.idle, 1);
    CYBN_ADD(&cybn_pool.away, -1);
}

static void *cybn_help(void *number) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "cybn");     /* for who looks at the process */
#endif
    long long away = 0, spin = CYBN_SPIN;   /* ns */
    for (;;) {
        cybn_task *task = cybn_next(spin);
        int place = (int)((size_t)number % (size_t)task->helpers) + 1, competes = task->worth == CYBN_COMPETE;
        long interruptions = cybn_interruptions();
        long long start = cybn_now(), end, lost = start - cybn_clock(CLOCK_THREAD_CPUTIME_ID);
        if (cybn_make_way(task)) {
            CYBN_ADD(&cybn_pool.helped, 1);
            cybn_take_part(task, place);
        }
        CYBN_ADD(&cybn_pool.idle, 1);
        CYBN_ADD(&task->inside, -1);    /* the last access to it */
        cybn_tell();
        end = cybn_now();
        lost = end - cybn_clock(CLOCK_THREAD_CPUTIME_ID) - lost;
        if (competes || lost < CYBN_LOST || cybn_interruptions() == interruptions) {
            away = 0;
            spin = (end - start) / 4;
            spin = spin < CYBN_SPIN ? CYBN_SPIN : spin < CYBN_SPIN_MOST ? spin : CYBN_SPIN_MOST;
        } else {
            spin = 0;
            away = away == 0 ? CYBN_AWAY : 2 * away < CYBN_AWAY_MOST ? 2 * away : CYBN_AWAY_MOST;
            cybn_stay_away(away);
        }
    }
    return NULL;
}

/* One more helper; 0 where the system refuses, which costs time and nothing else. Signals are for the threads of the
   program. The stack does not depend on the C library's choice (musl: 128 KB); a tile has up to 240 KB of arrays on it,
   four times as much under AddressSanitizer. */
#if defined(__SANITIZE_ADDRESS__)
enum { CYBN_STACK = 4 * 1024 * 1024 };
#else
enum { CYBN_STACK = 1024 * 1024 };
#endif
static int cybn_hire(size_t number) {
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    int hired;
    if (pthread_attr_init(&attributes) != 0) return 0;
    pthread_attr_setstacksize(&attributes, CYBN_STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    hired = pthread_create(&thread, &attributes, cybn_help, (void *)number) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return hired;
}

/* work(context, step, share) for every share of every step, the steps one after the other, by the calling thread and at
   most threads - 1 helpers. */
static void cybn_team(cybn_work work, void *context, Py_ssize_t steps, Py_ssize_t shares, Py_ssize_t back, int threads,
                      int worth) {
    cybn_task task, **link;
    int idle, room, missing, number;
    if (threads == 1) {
        cybn_alone(work, context, steps, shares, back);
        return;
    }
    idle = CYBN_LOAD(&cybn_pool.idle);
    room = CYBN_LOAD(&cybn_pool.helpers);   /* or as many as could be hired */
    room = (room > threads - 1 ? room : threads - 1) - CYBN_LOAD(&cybn_pool.away);
    if (room > threads - 1) room = threads - 1;
    if (worth == CYBN_CLOSE && cybn_now() - CYBN_LOAD(&cybn_pool.ended) < CYBN_SPIN) worth = CYBN_WAKE;
    if (worth < CYBN_WAKE && room > idle) room = idle;
    if (room <= 0) {
        cybn_alone(work, context, steps, shares, back);
    } else {
        task.work = work;
        task.context = context;
        task.worth = worth;
        task.steps = steps;
        task.shares = shares;
        task.back = back;
        task.done = 0;
        task.caller = pthread_self();
        task.processor = cybn_processor();
        task.helpers = task.room = room;
        task.inside = 0;
        memset(task.taken, 0, shares);
        pthread_mutex_lock(&cybn_pool.lock);
        task.next = cybn_pool.tasks;
        cybn_pool.tasks = &task;
        CYBN_ADD(&cybn_pool.room, room);
        missing = room - CYBN_LOAD(&cybn_pool.idle);
        if (cybn_pool.helpers < room) {
            number = cybn_pool.helpers;
            CYBN_ADD(&cybn_pool.helpers, room - number);
            CYBN_ADD(&cybn_pool.idle, room - number);
            for (; number < room; number++) {
                if (cybn_hire((size_t)number)) continue;
                CYBN_ADD(&cybn_pool.idle, number - room);
                CYBN_ADD(&cybn_pool.helpers, number - room);
                break;
            }
        }
        pthread_mutex_unlock(&cybn_pool.lock);
        for (; missing > 0; missing--) pthread_cond_signal(&cybn_pool.wanted);
        cybn_take_part(&task, 0);
        pthread_mutex_lock(&cybn_pool.lock);
        for (link = &cybn_pool.tasks; *link != &task; link = &(*link)->next) {}
        *link = task.next;
        CYBN_ADD(&cybn_pool.room, -task.room);
        pthread_mutex_unlock(&cybn_pool.lock);
        cybn_await(&task, -1);
    }
    __atomic_store_n(&cybn_pool.ended, cybn_now(), __ATOMIC_SEQ_CST);
}

/* Helpers of this process. */
static int cybn_helpers(void) {
    int n;
    pthread_mutex_lock(&cybn_pool.lock);
    n = cybn_pool.helpers;
    pthread_mutex_unlock(&cybn_pool.lock);
    return n;
}

static long cybn_helped(void) { return CYBN_LOAD(&cybn_pool.helped); }

/* In the child of a fork only the thread that forked exists: no helper, no task, and nobody who would open the lock. The
   handler is C's and not os.register_at_fork because servers written in C fork without telling Python. */
static void cybn_in_child(void) {
    pthread_mutex_init(&cybn_pool.lock, NULL);
    pthread_cond_init(&cybn_pool.wanted, NULL);
    pthread_cond_init(&cybn_pool.finished, NULL);
    cybn_pool.tasks = NULL;
    cybn_pool.room = cybn_pool.helpers = cybn_pool.idle = cybn_pool.sleepers = 0;
    cybn_pool.away = 0;
    cybn_pool.helped = 0;
}

static int cybn_prepare_team(void) { return pthread_atfork(NULL, NULL, cybn_in_child); }
#endif
#endif
