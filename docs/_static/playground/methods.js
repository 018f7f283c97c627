// What the playground computes: methods on two or three gradients in the plane, as the library defines them.
//
// A classic script without dependencies, not a module: browsers refuse modules in pages opened from a folder (file://).
// It leaves one name behind, `gradsurgeryMethods`. Rows are arrays [x, y]. The rows themselves are at hand here, so no
// Gram matrix is formed and no digits are lost in it; problems are solved for unit rows, as in gradsurgery/geometry.py.
"use strict";

const gradsurgeryMethods = (() => {
  const EPS = Number.EPSILON;
  // Radius of the ball of CAGrad, the library's default; its default `rescale=2` divides by 1 + c.
  const CAGRAD_C = 0.4;

  const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);
  const cross = (a, b) => a[0] * b[1] - a[1] * b[0];
  const norm = (a) => Math.hypot(...a);
  const scaled = (a, s) => a.map((x) => x * s);
  const plus = (a, b, s = 1) => a.map((x, k) => x + s * b[k]);
  const sum = (values) => values.reduce((total, x) => total + x, 0);
  const mixed = (rows, weights) => rows.reduce((d, row, i) => plus(d, row, weights[i]), rows[0].map(() => 0));

  // ---------------------------------------------------------------------------------------- least squares

  /** Orthonormal columns q and the upper triangle r of some columns; null if they are dependent. */
  function orthogonal(columns) {
    const q = [];
    const r = [];
    for (const column of columns) {
      let rest = column;
      const entries = q.map(() => 0);
      // Twice is enough: the second round takes out what rounding left behind.
      for (let round = 0; round < 2; round++) {
        q.forEach((direction, k) => {
          const part = dot(direction, rest);
          entries[k] += part;
          rest = plus(rest, direction, -part);
        });
      }
      const length = norm(rest);
      if (length <= 16 * columns.length * EPS * norm(column)) return null;
      q.push(scaled(rest, 1 / length));
      r.push([...entries, length]);
    }
    return { q, r };
  }

  /** Solution of R x = y for the triangle of `orthogonal`. */
  function backward(r, y) {
    const x = [...y];
    for (let k = x.length - 1; k >= 0; k--) {
      for (let j = k + 1; j < x.length; j++) x[k] -= r[j][k] * x[j];
      x[k] /= r[k][k];
    }
    return x;
  }

  /**
   * Non-negative least squares, argmin ‖Σ x_j columns_j − target‖ over x ≥ 0, by looking at every support.
   *
   * Of the supports whose solution is non-negative the first one counts, small ones first, at which no other column
   * could still help. The values of the problem are not compared: they agree to rounding where the solutions are 1e-8
   * apart.
   */
  function nonNegative(columns, target) {
    const m = columns.length;
    const supports = [[]];
    for (let size = 1; size <= Math.min(m, target.length); size++) {
      for (let bits = 1; bits < 1 << m; bits++) {
        const support = columns.map((_, j) => j).filter((j) => (bits >> j) & 1);
        if (support.length === size) supports.push(support);
      }
    }
    const enough = 8 * EPS * norm(target);
    let best = columns.map(() => 0);
    let least = Infinity;
    for (const support of supports) {
      const parts = orthogonal(support.map((j) => columns[j]));
      if (parts === null) continue;
      const solution = backward(parts.r, parts.q.map((direction) => dot(direction, target)));
      if (solution.some((x) => x < 0)) continue;
      const x = columns.map(() => 0);
      support.forEach((j, k) => { x[j] = solution[k]; });
      // The orthogonal part, taken out direction by direction, keeps more digits than target − Σ x_j columns_j.
      let rest = target;
      for (let round = 0; round < 2; round++) {
        parts.q.forEach((direction) => { rest = plus(rest, direction, -dot(direction, rest)); });
      }
      const gains = columns.map((column, j) => (support.includes(j) ? 0 : dot(column, rest) / norm(column)));
      const violation = Math.max(0, ...gains);
      if (violation <= enough) return x;
      if (violation < least) [best, least] = [x, violation];
    }
    return best;
  }

  /** Multipliers x ≥ 0 of the shortest e with ⟨u_i, e⟩ ≥ bounds_i, up to a factor (Lawson & Hanson 1974, chapter 23). */
  function leastDistance(units, bounds) {
    return nonNegative(units.map((unit, i) => [...unit, bounds[i]]), [0, 0, 1]);
  }

  // ---------------------------------------------------------------------------------------- rows

  /** The rows that are not zero: their places, lengths and unit rows. */
  function present(rows) {
    const places = rows.map((_, i) => i).filter((i) => norm(rows[i]) > 0);
    const lengths = places.map((i) => norm(rows[i]));
    return { places, lengths, units: places.map((i, k) => scaled(rows[i], 1 / lengths[k])) };
  }

  const spread = (m, places, values) => {
    const out = new Array(m).fill(0);
    places.forEach((i, k) => { out[i] = values[k]; });
    return out;
  };

  /** Weights of the shortest vector in the convex hull of the rows, and whether it is zero. */
  function shortest(rows) {
    const m = rows.length;
    const { lengths, units } = present(rows);
    if (units.length < m) {
      return { weights: rows.map((row) => (norm(row) > 0 ? 0 : 1 / (m - units.length))), stationary: true };
    }
    const a = lengths.map((length) => Math.min(...lengths) / length);
    const v = leastDistance(units, a);
    const stationary = norm(mixed(units, v)) <= 16 * m * EPS * sum(v);
    const weights = v.map((x, i) => x * a[i]);
    return { weights: scaled(weights, 1 / sum(weights)), stationary };
  }

  // ---------------------------------------------------------------------------------------- methods

  /** Weights of task i's projected gradient in PCGrad, for one order of its visits. */
  function visited(rows, i, order) {
    const weights = rows.map((_, j) => Number(i === j));
    let p = rows[i];
    for (const j of order) {
      const square = dot(rows[j], rows[j]);
      const along = dot(p, rows[j]);
      if (along < 0 && square > 0) {
        weights[j] -= along / square;
        p = plus(p, rows[j], -along / square);
      }
    }
    return weights;
  }

  /** The others of task i in every order, the order of the losses first. Two others at most. */
  function orders(m, i) {
    const others = [...Array(m).keys()].filter((j) => j !== i);
    return others.length < 2 ? [others] : [others, [...others].reverse()];
  }

  /** Every outcome of PCGrad's draw: the weights for each combination of orders, all equally likely. */
  function pcgradOutcomes(rows) {
    let outcomes = [rows.map(() => 0)];
    rows.forEach((_, i) => {
      const own = orders(rows.length, i).map((order) => visited(rows, i, order));
      outcomes = outcomes.flatMap((total) => own.map((weights) => plus(total, weights)));
    });
    return outcomes;
  }

  /** PCGrad as with `shuffle=False`: every task meets the others in the order of the losses. */
  function pcgradInOrder(rows) {
    return rows.map((_, i) => visited(rows, i, orders(rows.length, i)[0])).reduce((a, b) => plus(a, b));
  }

  function pcgrad(rows) {
    const outcomes = pcgradOutcomes(rows);
    return { weights: scaled(outcomes.reduce((a, b) => plus(a, b)), 1 / outcomes.length) };
  }

  function mgda(rows) {
    const { weights, stationary } = shortest(rows);
    return { weights: stationary ? rows.map(() => 0) : scaled(weights, rows.length), stationary };
  }

  /** Sum of the projections of the rows on the cone of directions in which no loss rises. */
  function upgrad(rows) {
    const { places, lengths, units } = present(rows);
    const total = rows.map(() => 1);
    units.forEach((unit, i) => {
      if (!units.some((other) => dot(unit, other) < 0)) return;
      nonNegative(units, scaled(unit, -1)).forEach((pushed, j) => {
        total[places[j]] += (pushed * lengths[i]) / lengths[j];
      });
    });
    return { weights: total };
  }

  /**
   * Nash-MTL: in the plane d = √m (cos θ, sin θ) and w_i = 1 / ⟨g_i, d⟩, where θ maximises Σ log ⟨u_i, d⟩ in the cone
   * of common descent. The derivative, a sum of cotangents, falls from +∞ to −∞ across the cone: one root.
   */
  function nash(rows) {
    const m = rows.length;
    const { places, lengths, units } = present(rows);
    const still = { weights: rows.map(() => 0), stationary: true };
    if (!units.length || shortest(places.map((i) => rows[i])).stationary) return still;
    // Angles are measured from the clockwise edge of the cone, a quarter turn back from the row furthest anticlockwise.
    const lead = units.map((unit) => Math.min(...units.map((other) => cross(other, unit))));
    const outermost = units[lead.indexOf(Math.max(...lead))];
    const behind = units.map((other) => Math.atan2(Math.max(0, cross(other, outermost)), dot(other, outermost)));
    const widest = Math.max(...behind);
    const last = units[behind.indexOf(widest)];
    // π − widest would lose the digits of a narrow cone.
    const width = Math.atan2(cross(last, outermost), -dot(last, outermost));
    const sines = (s) => behind.map((angle) => (angle === widest ? Math.sin(width - s) : Math.sin(s + angle)));
    const slope = (s) => sum(behind.map((angle) => (
      angle === widest ? -1 / Math.tan(width - s) : 1 / Math.tan(s + angle))));
    let [low, high] = [0, width];
    if (widest === 0) [low, high] = [Math.PI / 2, Math.PI / 2]; // all rows point one way
    for (;;) {
      const middle = (low + high) / 2;
      if (middle <= low || middle >= high) break;
      if (slope(middle) > 0) low = middle;
      else high = middle;
    }
    const found = widest === 0 ? units.map(() => 1) : sines((low + high) / 2);
    const weights = found.map((sine, k) => 1 / (lengths[k] * sine));
    // The library's scale: weights that sum to m.
    return { weights: spread(m, places, scaled(weights, m / sum(weights))) };
  }

  /** CAGrad: the largest min_i ⟨g_i, d⟩ within c ‖g_0‖ of the mean g_0. */
  function cagrad(rows, c = CAGRAD_C) {
    const m = rows.length;
    const { places, lengths, units } = present(rows);
    const weights = rows.map(() => 1 / (1 + c)); // the mean; rescaled below is what comes on top
    if (!places.length) return { weights, stationary: true };
    const mean = mixed(units, scaled(lengths, 1 / sum(lengths)));
    const length = norm(mean);
    if (length <= 16 * places.length * EPS) return { weights, stationary: true };
    const found = cagradPush(units, lengths, scaled(mean, 1 / length), c, shortest(places.map((i) => rows[i])).stationary);
    places.forEach((i, k) => { weights[i] += (found.push[k] * length * sum(lengths)) / lengths[k] / (1 + c); });
    return { weights, stationary: found.degenerate };
  }

  /**
   * Multipliers x ≥ 0 with d = g_0 + Σ x_i u_i, for ‖g_0‖ = 1.
   *
   * Where the rows are Pareto stationary and no loss need rise, many d are optimal and the one closest to g_0 is
   * taken. Otherwise d lies on the circle, and either one row alone is the worst off, or two are equally so. The right
   * place is where no third row is worse off.
   */
  function cagradPush(units, lengths, mean, c, stationary) {
    if (stationary) {
      const push = nonNegative(units, scaled(mean, -1));
      if (norm(mixed(units, push)) <= c) return { push, degenerate: true };
    }
    const values = (e) => units.map((unit, i) => lengths[i] * (dot(unit, mean) + dot(unit, e)));
    let best = null;
    let least = Infinity;
    const consider = (support, e, push) => {
      const reached = values(e);
      const worst = Math.max(...support.map((i) => reached[i]));
      const violation = Math.max(0, ...reached.map((value, i) => (support.includes(i) ? 0 : (worst - value) / lengths[i])));
      if (least > 8 * EPS && violation < least) [best, least] = [push, violation];
    };
    units.forEach((unit, i) => consider([i], scaled(unit, c), units.map((_, k) => (k === i ? c : 0))));
    units.forEach((first, i) => units.slice(i + 1).forEach((second, k) => {
      const j = i + 1 + k;
      const parts = orthogonal([first, second]);
      if (parts === null) return;
      // ⟨g_i − g_j, g_0 + e⟩ = 0 on the circle ‖e‖ = c.
      const difference = plus(scaled(first, lengths[i]), second, -lengths[j]);
      const size = norm(difference);
      const across = [-difference[1] / size, difference[0] / size];
      const along = -dot(difference, mean) / size;
      if (!(Math.abs(along) <= c)) return;
      [1, -1].forEach((side) => {
        const e = plus(scaled(difference, along / size), across, side * Math.sqrt((c - along) * (c + along)));
        const push = backward(parts.r, parts.q.map((direction) => dot(direction, e)));
        if (push.every((x) => x >= 0)) consider([i, j], e, spread(units.length, [i, j], push));
      });
    }));
    return { push: best, degenerate: false };
  }

  const METHODS = [
    { key: "sum", name: "plain sum", weights: (rows) => ({ weights: rows.map(() => 1) }) },
    { key: "pcgrad", name: "PCGrad", weights: pcgrad },
    { key: "mgda", name: "MGDA", weights: mgda },
    { key: "cagrad", name: "CAGrad", weights: (rows) => cagrad(rows) },
    { key: "nash", name: "Nash-MTL", weights: nash },
    { key: "upgrad", name: "UPGrad", weights: upgrad },
  ];

  // ---------------------------------------------------------------------------------------- what it means

  /**
   * What a step along −d does to each loss, to first order: −1 it falls, 1 it rises, 0 neither. A slope ⟨g_i, d⟩ is
   * zero when it is no more than rounding of the terms of d.
   */
  function effects(rows, weights, direction) {
    const terms = sum(rows.map((row, i) => Math.abs(weights[i]) * norm(row)));
    return rows.map((row) => {
      const slope = dot(row, direction);
      return Math.abs(slope) <= 1e-12 * terms * norm(row) ? 0 : -Math.sign(slope);
    });
  }

  /** Everything about one method: weights, direction, slopes ⟨g_i, d⟩, effects on the losses, and a flag. */
  function solve(key, rows) {
    const method = METHODS.find((each) => each.key === key);
    const { weights, stationary = false } = method.weights(rows);
    const direction = mixed(rows, weights);
    return {
      weights,
      direction,
      slopes: rows.map((row) => dot(row, direction)),
      effects: effects(rows, weights, direction),
      stationary,
    };
  }

  /**
   * The directions in which no loss rises, {d: ⟨g_i, d⟩ ≥ 0}: kind "plane", "wedge" (with its angles, up to a half
   * plane), "line", "ray" or "point". Only inside a wedge do all losses fall.
   */
  function cone(rows) {
    const { units } = present(rows);
    if (!units.length) return { kind: "plane" };
    const angles = units.map((unit) => Math.atan2(unit[1], unit[0])).sort((a, b) => a - b);
    const gaps = angles.map((angle, i) => (i + 1 < angles.length ? angles[i + 1] - angle : angles[0] + 2 * Math.PI - angle));
    const gap = Math.max(...gaps);
    const i = gaps.indexOf(gap);
    const tolerance = 1e-12;
    const quarter = Math.PI / 2;
    // Seen anticlockwise, the widest gap between rows starts at the last of them. The cone starts a quarter turn before.
    const start = angles[i] - quarter;
    if (gap > Math.PI + tolerance) return { kind: "wedge", from: start, to: start + gap - Math.PI };
    if (gap < Math.PI - tolerance) return { kind: "point" };
    const along = [Math.cos(start), Math.sin(start)];
    if (units.every((unit) => Math.abs(dot(unit, along)) <= tolerance)) return { kind: "line", from: start };
    return { kind: "ray", from: start };
  }

  return { METHODS, solve, cone, effects, pcgradOutcomes, pcgradInOrder, norm, dot };
})();
