"""gunicorn -c examples/service/gunicorn.conf.py: a process for every core, forked from one that is ready to answer."""

import os
import sys
from pathlib import Path

pythonpath = str(Path(__file__).parents[1])
sys.path.insert(0, pythonpath)  # (gunicorn does it later)
from service.cores import usable_cores  # noqa: E402

wsgi_app = "service.app:create_app()"
worker_class = "uvicorn_worker.UvicornWorker"
bind = f"127.0.0.1:{os.environ.get('PORT', 8000)}"
# The application reads it too, to share the cores.
workers = int(os.environ.setdefault("WEB_CONCURRENCY", str(usable_cores())))
# The network is loaded and warmed up once, before the fork; the workers share its memory.
preload_app = True
graceful_timeout = 10
control_socket_disable = True
