// What the playground computes: methods on two or three gradients in the plane, as the library defines them.
//
// A classic script without dependencies, not a module: browsers refuse modules in pages opened from a folder (file://).
// It leaves one name behind, `gradsurgeryMethods`. Rows are arrays [x, y]. The rows themselves are at hand here, so no
// Gram matrix is formed and no digits are lost in it; problems are solved for unit rows, as in gradsurgery/geometry.
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
   * The direction of the largest Σ ⟨g_i, d⟩^(1−α) / (1−α), of Σ log ⟨g_i, d⟩ for α = 1, among those of one length: its
   * weights are ∝ ⟨g_i, d⟩^−α, and sum to m. In the plane d has an angle θ, and the derivative in θ, the sum of
   * n_i^(1−α) cos / sin^α, falls from +∞ to −∞ across the cone of common descent: one root.
   */
  function fairest(rows, alpha) {
    const m = rows.length;
    const { places, lengths, units } = present(rows);
    const still = { weights: rows.map(() => 0), stationary: true };
    if (!units.length || shortest(places.map((i) => rows[i])).stationary) return still;
    const lead = units.map((unit) => Math.min(...units.map((other) => cross(other, unit))));
    const first = units[lead.indexOf(Math.max(...lead))]; // furthest anticlockwise
    const behind = units.map((unit) => Math.atan2(Math.max(0, cross(unit, first)), dot(unit, first)));
    const widest = Math.max(...behind);
    const shares = lengths.map((length) => (length / Math.min(...lengths)) ** (1 - alpha));
    let found = units.map(() => 1); // all rows point one way
    if (widest > 0) {
      const last = units[behind.indexOf(widest)];
      // π − widest would lose the digits of a narrow cone.
      const width = Math.atan2(cross(last, first), -dot(last, first));
      // Angles are measured from the edge of the cone that is closer to θ, which is a quarter turn from one of the two.
      const sine = (angle, s) => Math.sin(angle === widest ? width - s : s + angle);
      const cosine = (angle, s) => (angle === widest ? -Math.cos(width - s) : Math.cos(s + angle));
      const slope = (angles, s) => sum(angles.map((angle, i) => (shares[i] * cosine(angle, s)) / sine(angle, s) ** alpha));
      const ahead = units.map((unit) => (unit === first ? widest : Math.atan2(Math.max(0, cross(last, unit)), dot(unit, last))));
      const angles = slope(behind, width / 2) > 0 ? ahead : behind;
      let [low, high] = [0, width];
      for (;;) {
        const middle = (low + high) / 2;
        if (middle <= low || middle >= high) break;
        if (slope(angles, middle) > 0) low = middle;
        else high = middle;
      }
      found = angles.map((angle) => sine(angle, (low + high) / 2));
    }
    const weights = found.map((each, i) => shares[i] / (lengths[i] * each ** alpha));
    return { weights: spread(m, places, scaled(weights, m / sum(weights))) };
  }

  /** The sum of the rows, projected on the cone of directions in which no loss rises. */
  function dualProjection(rows) {
    const { places, lengths, units } = present(rows);
    const weights = rows.map(() => 1);
    const total = mixed(rows, weights);
    if (!units.some((unit) => dot(unit, total) < 0)) return { weights };
    nonNegative(units, scaled(total, -1)).forEach((pushed, i) => { weights[places[i]] += pushed / lengths[i]; });
    return { weights };
  }

  function fairgrad(rows, { alpha }) {
    return alpha === 0 ? dualProjection(rows) : fairest(rows, alpha);
  }

  /** CAGrad: the largest min_i ⟨g_i, d⟩ within c ‖g_0‖ of the mean g_0. */
  function cagrad(rows, { c }) {
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

  /** ConicGrad: the largest min_i ⟨g_i, d⟩ within a cone around the mean g_0, cos(d, g_0) ≥ c, as long as m g_0. */
  function conic(rows, { c }) {
    const weights = rows.map(() => 1);
    const { places, lengths, units } = present(rows);
    const own = places.map((i) => rows[i]);
    const mean = mixed([[0, 0], ...units], [0, ...scaled(lengths, 1 / sum(lengths))]);
    if (norm(mean) <= 16 * places.length * EPS) return { weights, stationary: true };
    if (c === 1) return { weights };
    const length = norm(mean) * sum(lengths);
    const middle = scaled(mean, 1 / norm(mean));
    const { weights: hull, stationary } = shortest(own);
    const inside = (d) => norm(d) > 0 && dot(d, middle) >= c * norm(d);
    const answer = (found) => {
      const size = norm(mixed(own, found));
      places.forEach((i, k) => { weights[i] = (found[k] * length) / size; });
    };
    if (!stationary && inside(mixed(own, hull))) {
      answer(hull);
      return { weights };
    }
    const side = Math.sqrt((1 - c) * (1 + c));
    for (const turn of [side, -side]) {
      // An edge d of the cone is the answer if it points to g_i + μ g_0 for the row i that is worst off there, μ ≥ 0.
      const edge = [c * middle[0] - turn * middle[1], c * middle[1] + turn * middle[0]];
      const values = own.map((row) => dot(row, edge));
      const worst = values.indexOf(Math.min(...values));
      const share = cross(edge, own[worst]) / turn;
      if (share >= 0 && values[worst] + share * c > 16 * own.length * EPS * (lengths[worst] + share)) {
        answer(own.map((_, k) => share / length + (k === worst ? 1 : 0)));
        return { weights };
      }
    }
    // Pareto stationary: of the directions that raise no loss the one closest to the mean, if there is one.
    const push = nonNegative(units, scaled(middle, -1));
    const projected = plus(middle, mixed(units, push));
    if (norm(projected) > 16 * own.length * EPS * (1 + sum(push)) && inside(projected)) answer(push.map((x, k) => x / lengths[k] + 1 / length));
    return { weights, stationary: true };
  }

  /** What ConFIG takes for the lengths of all rows. */
  const LENGTHS = {
    projection: (n) => n,
    min: (n) => n.map(() => Math.min(...n)),
    max: (n) => n.map(() => Math.max(...n)),
    mean: (n) => n.map(() => sum(n) / n.length),
    harmonic: (n) => n.map(() => n.length / sum(n.map((x) => 1 / x))),
    geometric: (n) => n.map(() => Math.exp(sum(n.map(Math.log)) / n.length)),
  };

  /** ConFIG: the direction that has one cosine with all rows, v = U⁺1 for the unit rows U, as long as Σ L_i cos(g_i, v). */
  function config(rows, { length }) {
    const { places, lengths, units } = present(rows);
    if (!places.length) return { weights: rows.map(() => 0), stationary: true };
    const counted = LENGTHS[length](lengths);
    let shares = units.map(() => 1); // of two or less independent rows; those that point one way add up, too
    let total = sum(counted);
    if (units.length > 2 || (units.length === 2 && orthogonal(units) === null)) {
      shares = balanced(units);
      const v = mixed(units, shares);
      if (dot(v, v) <= units.length * EPS) return { weights: rows.map(() => 0), stationary: true };
      total = sum(units.map((unit, k) => dot(unit, v) * counted[k]));
    }
    const weights = shares.map((share, k) => (share * total) / sum(shares) / lengths[k]);
    return { weights: spread(rows.length, places, weights) };
  }

  /** The shortest y of those with the least Σ (⟨u_i, v⟩ − 1)², v = Σ y_i u_i: columns made orthogonal by one rotation. */
  function balanced(units) {
    const [x, y] = [0, 1].map((k) => units.map((unit) => unit[k]));
    const angle = Math.atan2(2 * dot(x, y), dot(x, x) - dot(y, y)) / 2;
    const [c, s] = [Math.cos(angle), Math.sin(angle)];
    const columns = [plus(scaled(x, c), y, s), plus(scaled(y, c), x, -s)];
    const large = Math.max(...columns.map(norm));
    const ones = units.map(() => 1);
    return columns.filter((column) => norm(column) > 16 * units.length * EPS * large)
      .map((column) => scaled(column, dot(column, ones) / dot(column, column) ** 2))
      .reduce((total, part) => plus(total, part), units.map(() => 0));
  }

  /** GCS: the others as far as they agree with the first, by their cosine or, switched, whole. */
  function gcs(rows, { switched }) {
    const size = norm(rows[0]);
    return {
      weights: rows.map((row, i) => {
        if (i === 0) return 1;
        const cosine = size > 0 && norm(row) > 0 ? dot(scaled(row, 1 / norm(row)), rows[0]) / size : 0;
        if (switched) return Number(cosine > 8 * EPS);
        return Math.max(0, cosine);
      }),
    };
  }

  /** BLUR: the first gradient, which forgets, and what is at a right angle to it in the sum of the others. */
  function blur(rows) {
    const [forget, ...retain] = rows;
    const weights = rows.map(() => 1);
    const square = dot(forget, forget);
    if (square > 0) weights[0] -= sum(retain.map((row) => dot(row, forget))) / square;
    return { weights };
  }

  /** SAGO: in each coordinate the first gradient, which forgets, or the sum of the others where their signs differ. */
  function sago(rows, { prefer_retain: prefer }) {
    const [forget, ...others] = rows;
    const retain = others.reduce((total, row) => plus(total, row));
    if (norm(forget) === 0) return { weights: null, direction: retain };
    const agreed = prefer ? plus(forget, retain) : forget;
    return {
      weights: null,
      direction: forget.map((f, k) => (Math.sign(f) * Math.sign(retain[k]) < 0 ? retain[k] : agreed[k])),
    };
  }

  /**
   * Names and options are those of the library: the call is name(optimizer, option=value). An option is a number from
   * `least` to `most`, one of some `values`, or a switch. `more` methods are shown when they are asked for.
   */
  const METHODS = [
    { key: "sum", name: "plain sum", weights: (rows) => ({ weights: rows.map(() => 1) }) },
    { key: "pcgrad", name: "PCGrad", weights: pcgrad },
    { key: "mgda", name: "MGDA", weights: mgda },
    { key: "cagrad", name: "CAGrad", weights: cagrad, option: { name: "c", least: 0, most: 2, step: 0.1, initial: CAGRAD_C } },
    { key: "nash", name: "Nash-MTL", weights: (rows) => fairest(rows, 1) },
    { key: "upgrad", name: "UPGrad", weights: upgrad },
    { key: "config", name: "ConFIG", weights: config, more: true, option: { name: "length", values: Object.keys(LENGTHS), initial: "projection" } },
    { key: "conic", name: "ConicGrad", weights: conic, more: true, option: { name: "c", least: 0, most: 1, step: 0.05, initial: 0.5 } },
    { key: "fairgrad", name: "FairGrad", weights: fairgrad, more: true, option: { name: "alpha", least: 0, most: 4, step: 0.5, initial: 2 } },
    { key: "gcs", name: "GCS", weights: gcs, more: true, option: { name: "switched", initial: false } },
    { key: "blur", name: "BLUR", weights: blur, more: true },
    { key: "sago", name: "SAGO", weights: sago, more: true, option: { name: "prefer_retain", initial: false } },
  ];

  // ---------------------------------------------------------------------------------------- what it means

  /**
   * What a step along −d does to each loss, to first order: −1 it falls, 1 it rises, 0 neither. A slope ⟨g_i, d⟩ is
   * zero when it is no more than rounding of the terms of d.
   */
  function effects(rows, terms, direction) {
    return rows.map((row) => {
      const slope = dot(row, direction);
      return Math.abs(slope) <= 1e-12 * terms * norm(row) ? 0 : -Math.sign(slope);
    });
  }

  /**
   * Everything about one method: weights (null if it has none), direction, the length of its terms, slopes ⟨g_i, d⟩,
   * effects on the losses, and a flag. Of options that are not given the library's defaults are taken.
   */
  function solve(key, rows, given = {}) {
    const { weights: own, option } = METHODS.find((each) => each.key === key);
    const { weights, stationary = false, ...rest } = own(rows, { ...(option ? { [option.name]: option.initial } : {}), ...given });
    const direction = rest.direction ?? mixed(rows, weights);
    const terms = sum(rows.map((row, i) => (weights === null ? 1 : Math.abs(weights[i])) * norm(row)));
    return {
      weights,
      direction,
      terms,
      slopes: rows.map((row) => dot(row, direction)),
      effects: effects(rows, terms, direction),
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

  return { METHODS, solve, cone, pcgradOutcomes, pcgradInOrder, norm, dot };
})();
