from elastic3d.elastic.attachment import adapter_for as adapter_for
from elastic3d.elastic.attachment import attach as attach
from elastic3d.elastic.attachment import detach as detach
from elastic3d.elastic.attachment import find_session as find_session
from elastic3d.elastic.attachment import has_routers as has_routers
from elastic3d.elastic.attachment import load_routers as load_routers
from elastic3d.elastic.attachment import save_routers as save_routers
from elastic3d.elastic.attachment import session_of as session_of
