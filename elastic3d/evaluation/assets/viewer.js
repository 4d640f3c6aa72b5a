"use strict";
// Draws meshes with WebGL 2: flat shading from screen-space derivatives, one camera for all canvases of a page.

const VERTEX = `#version 300 es
in vec3 position, colour; in float heat;
uniform mat4 view; uniform vec3 low, size;
out vec3 at, own; out float value;
void main() { vec3 p = low + size * position; at = (view * vec4(p, 1.)).xyz; value = heat; own = colour;
  float n = .1, f = 30., k = 2.747;  // perspective with a field of view of 40 degrees
  gl_Position = vec4(k * at.xy, -((f + n) * at.z + 2. * f * n) / (f - n), -at.z); }`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec3 at, own; in float value; uniform bool showHeat; out vec4 colour;
vec3 ramp(float t) {
  vec3 stops[5] = vec3[5](vec3(.851, .867, .886), vec3(.969, .82, .239), vec3(.949, .439, .227),
                          vec3(.722, .141, .369), vec3(.231, .059, .322));
  float x = clamp(t, 0., 1.) * 4.; int i = min(int(x), 3); return mix(stops[i], stops[i + 1], x - float(i)); }
void main() {
  vec3 normal = normalize(cross(dFdx(at), dFdy(at)));
  float light = .35 + .65 * abs(dot(normal, normalize(vec3(.3, .5, 1.))));
  colour = vec4((showHeat ? ramp(value) : own) * light, 1.); }`;

function bytes(text) {
  return Uint8Array.from(atob(text), c => c.charCodeAt(0));
}

class MeshCanvas {
  constructor(canvas) {
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", {antialias: true, preserveDrawingBuffer: true});
    if (!this.gl) return canvas.replaceWith("WebGL 2 is not available in this browser.");
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.bindAttribLocation(program, 0, "position");
    gl.bindAttribLocation(program, 1, "heat");
    gl.bindAttribLocation(program, 2, "colour");
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.clearColor(1, 1, 1, 1);
    this.at = name => gl.getUniformLocation(program, name);
    this.buffers = [gl.createBuffer(), gl.createBuffer(), gl.createBuffer(), gl.createBuffer()];
    this.count = 0;
  }

  load(mesh) {
    // `heat` and `colours` are optional; without colours the mesh is `tint`, or grey.
    if (!this.gl) return;
    const gl = this.gl, [positions, heat, colours, faces] = this.buffers;
    this.attribute(0, positions, mesh.positions, 3, gl.UNSIGNED_SHORT, 8);
    this.attribute(1, heat, mesh.heat, 1, gl.UNSIGNED_BYTE, 0);
    this.attribute(2, colours, mesh.colours, 3, gl.UNSIGNED_BYTE, 4);
    gl.vertexAttrib3fv(2, mesh.tint || [.78, .79, .81]);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, faces);
    const indices = bytes(mesh.faces);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
    this.wide = mesh.wide;
    this.count = indices.length / (mesh.wide ? 4 : 2);
    gl.uniform3fv(this.at("low"), mesh.low);
    gl.uniform3fv(this.at("size"), mesh.size);
  }

  attribute(place, buffer, text, width, kind, stride) {
    const gl = this.gl;
    if (!text) return gl.disableVertexAttribArray(place);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, bytes(text), gl.STATIC_DRAW);
    gl.vertexAttribPointer(place, width, kind, true, stride, 0);
    gl.enableVertexAttribArray(place);
  }

  draw(camera, showHeat) {
    if (!this.gl || !this.canvas.clientWidth) return;
    const gl = this.gl, side = Math.round(this.canvas.clientWidth * Math.min(devicePixelRatio || 1, 2));
    if (this.canvas.width !== side) this.canvas.width = this.canvas.height = side;
    gl.viewport(0, 0, side, side);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const [ca, sa, ce, se] = [Math.cos(camera.azimuth), Math.sin(camera.azimuth),
                              Math.cos(camera.elevation), Math.sin(camera.elevation)];
    gl.uniformMatrix4fv(this.at("view"), false, [ca, -sa * se, sa * ce, 0, 0, ce, se, 0,
                                                 -sa, -ca * se, ca * ce, 0, 0, 0, -camera.distance, 1]);
    gl.uniform1i(this.at("showHeat"), showHeat ? 1 : 0);
    if (this.count) gl.drawElements(gl.TRIANGLES, this.count, this.wide ? gl.UNSIGNED_INT : gl.UNSIGNED_SHORT, 0);
  }
}

class LinkedViews {
  // Canvases with one camera: dragging any of them turns all.
  constructor(canvases, distance = 5.1) {
    this.distance = distance;
    this.canvases = [...canvases].map(canvas => new MeshCanvas(canvas));
    this.pointers = new Map();
    const resized = new ResizeObserver(() => this.draw());  // also once there is a size at all
    for (const {canvas} of this.canvases) {
      this.listen(canvas);
      resized.observe(canvas);
    }
    this.reset();
  }

  get showHeat() {
    return false;
  }

  reset() {
    this.camera = {azimuth: 0.6, elevation: 0.35, distance: this.distance};
    this.draw();
  }

  draw() {
    for (const view of this.canvases) view.draw(this.camera, this.showHeat);
  }

  zoom(factor) {
    this.camera.distance = Math.min(15, Math.max(1.5, this.camera.distance * factor));
    this.draw();
  }

  listen(canvas) {
    canvas.onpointerdown = event => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, event);
    };
    canvas.onpointerup = canvas.onpointercancel = event => this.pointers.delete(event.pointerId);
    canvas.onpointermove = event => {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const other = [...this.pointers.values()].find(p => p.pointerId !== event.pointerId);
      if (other) {
        const gap = p => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
        this.zoom(gap(before) / Math.max(gap(event), 1));
      } else {
        this.camera.azimuth -= (event.clientX - before.clientX) * 0.01;
        const elevation = this.camera.elevation + (event.clientY - before.clientY) * 0.01;
        this.camera.elevation = Math.min(1.5, Math.max(-1.5, elevation));
        this.draw();
      }
      this.pointers.set(event.pointerId, event);
    };
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      this.zoom(Math.exp(event.deltaY * 0.001));
    }, {passive: false});
  }
}

class PairViewer extends LinkedViews {
  // The canvases of `section` show both meshes of one item.
  constructor(section, meshes) {
    super(section.querySelectorAll("canvas"));
    this.meshes = meshes;
    this.heat = section.querySelector("#viewer-heat");
    this.turn = section.querySelector("#viewer-turn");
    this.item = section.querySelector("#viewer-item");
    for (const name of Object.keys(meshes)) this.item.add(new Option(name));
    this.item.onchange = () => this.show(this.item.value);
    this.heat.onchange = () => this.draw();
    this.turn.onchange = () => this.spin();
    section.querySelector("#viewer-reset").onclick = () => this.reset();
    this.show(this.item.value);
  }

  get showHeat() {
    return Boolean(this.heat && this.heat.checked);
  }

  show(name) {
    this.item.value = name;
    for (const view of this.canvases) view.load(this.meshes[name][view.canvas.dataset.side]);
    this.draw();
  }

  spin() {
    if (!this.turn.checked) return;
    this.camera.azimuth += 0.01;
    this.draw();
    requestAnimationFrame(() => this.spin());
  }
}
