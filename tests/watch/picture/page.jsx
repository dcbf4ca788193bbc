// Draws a committed dashboard from a live Prometheus with the components of @grafana/ui.
//
// What is Grafana's: panels' frames, charts with their axes and legends, big numbers, units,
// colours, field settings and transformations. What is not: the grid, the head of the page, the
// filling in of variables, the cells of tables, and the heat map, whose component is no part of
// the library.

import {
  applyFieldOverrides,
  createTheme,
  FieldType,
  formattedValueToString,
  getFieldDisplayName,
  getDisplayProcessor,
  standardEditorsRegistry,
  standardFieldConfigEditorRegistry,
  standardTransformers,
  standardTransformersRegistry,
  ThemeContext,
  toDataFrame,
  transformDataFrame,
} from '@grafana/data';
import {
  BigValue,
  BigValueColorMode,
  BigValueGraphMode,
  BigValueTextMode,
  PanelChrome,
  TimeSeries,
} from '@grafana/ui';
import React from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';

const theme = createTheme({ colors: { mode: 'light' } });
const COLUMN = 56;
const ROW = 34;
const GAP = 8;

// Settings of fields that Grafana's application registers; here only their names are needed.
const setting = (id, path = id) => ({
  id,
  path,
  name: id,
  shouldApply: () => true,
  process: (value) => value,
  isCustom: path !== id,
  override: () => null,
  editor: () => null,
  settings: {},
});
standardEditorsRegistry.setInit(() => []);
standardFieldConfigEditorRegistry.setInit(() =>
  ['unit', 'min', 'max', 'decimals', 'displayName', 'color', 'thresholds', 'mappings', 'noValue'].map(
    (id) => setting(id)
  )
);
standardTransformersRegistry.setInit(() =>
  // Some have an old name beside the new one.
  [...new Map(Object.values(standardTransformers).map((each) => [each.id, each])).values()].map(
    (transformation) => ({
      id: transformation.id,
      name: transformation.name,
      transformation,
      editor: () => null,
    })
  )
);
const CUSTOM = [
  'axisSoftMax', 'axisSoftMin', 'drawStyle', 'fillOpacity', 'lineInterpolation', 'lineStyle',
  'lineWidth', 'showPoints', 'spanNulls', 'stacking',
];
const custom = CUSTOM.map((id) => setting(`custom.${id}`, id));
const registry = {
  getIfExists: (id) =>
    custom.find((each) => each.id === id) ?? standardFieldConfigEditorRegistry.getIfExists(id),
  list: () => [...standardFieldConfigEditorRegistry.list(), ...custom],
};

function filled(text, values) {
  return text.replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
}

async function ask(path, query) {
  const answer = await fetch(`${settings.prometheus}/api/v1/${path}?${new URLSearchParams(query)}`);
  const body = await answer.json();
  if (body.status !== 'success') {
    throw new Error(body.error);
  }
  return body.data.result;
}

function legend(format, labels) {
  return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '');
}

const number = (text) => (Number.isFinite(Number(text)) ? Number(text) : null);

async function framesOf(target) {
  const query = filled(target.expr, settings.variables);
  const { from, to, step } = settings;
  if (target.format === 'table') {
    const series = await ask('query', { query, time: to });
    const labels = [...new Set(series.flatMap((each) => Object.keys(each.metric)))];
    return [
      toDataFrame({
        refId: target.refId,
        fields: [
          { name: 'Time', type: FieldType.time, values: series.map((each) => each.value[0] * 1000) },
          ...labels.map((name) => ({
            name,
            type: FieldType.string,
            values: series.map((each) => each.metric[name]),
          })),
          {
            name: `Value #${target.refId}`,
            type: FieldType.number,
            values: series.map((each) => number(each.value[1])),
          },
        ],
      }),
    ];
  }
  const series = target.instant
    ? (await ask('query', { query, time: to })).map((each) => ({ ...each, values: [each.value] }))
    : await ask('query_range', { query, start: from, end: to, step });
  const times = target.instant ? null : [];
  for (let at = from; times && at <= to; at += step) {
    times.push(at);
  }
  return series.map((each) => {
    const known = new Map(each.values.map(([at, value]) => [Math.round(at), number(value)]));
    const at = times ?? each.values.map(([when]) => when);
    return toDataFrame({
      refId: target.refId,
      name: legend(target.legendFormat, each.metric),
      fields: [
        { name: 'Time', type: FieldType.time, values: at.map((when) => when * 1000) },
        {
          name: 'Value',
          type: FieldType.number,
          labels: each.metric,
          config: { displayNameFromDS: legend(target.legendFormat, each.metric) },
          values: at.map((when) => known.get(Math.round(when)) ?? null),
        },
      ],
    });
  });
}

async function dataOf(panel) {
  let frames = (await Promise.all(panel.targets.map(framesOf))).flat();
  for (const transformation of panel.transformations ?? []) {
    frames = await lastValueFrom(transformDataFrame([transformation], frames));
  }
  return applyFieldOverrides({
    data: frames,
    fieldConfig: panel.fieldConfig,
    fieldConfigRegistry: registry,
    replaceVariables: (text) => filled(text, settings.variables),
    theme,
    timeZone: 'utc',
  });
}

function Big({ panel, data, width, height }) {
  const field = data[0]?.fields[1];
  const value = field?.values[field.values.length - 1];
  const show = field?.display ?? getDisplayProcessor({ theme });
  const shown = value === undefined || value === null ? { text: 'No data', numeric: NaN } : show(value);
  return (
    <BigValue
      theme={theme}
      width={width}
      height={height}
      value={shown}
      colorMode={BigValueColorMode.Value}
      graphMode={BigValueGraphMode.None}
      textMode={BigValueTextMode.Value}
    />
  );
}

function Lines({ panel, data, width, height }) {
  if (!data.length) {
    return <Nothing width={width} height={height} />;
  }
  return (
    <TimeSeries
      frames={data}
      timeRange={range()}
      timeZone="utc"
      width={width}
      height={height}
      legend={{ ...panel.options.legend, calcs: [] }}
      options={panel.options}
      replaceVariables={(text) => text}
    />
  );
}

// Grafana's own shades for the scheme that the panel names.
const BLUES = ['#ffffff', '#deebf7', '#c6dbef', '#9ecae1', '#6baed6', '#4292c6', '#2171b5', '#08519c'];

function HeatMap({ data, width, height }) {
  const rows = data
    .map((frame) => ({ bound: Number(frame.name.replace('+Inf', 'Infinity')), values: frame.fields[1].values }))
    .sort((a, b) => a.bound - b.bound);
  const cells = rows.map((row, at) =>
    row.values.map((value, column) => Math.max((value ?? 0) - (at ? rows[at - 1].values[column] ?? 0 : 0), 0))
  );
  const used = cells.map((row) => row.some((count) => count >= 0.5));
  const shown = rows.slice(used.indexOf(true), used.lastIndexOf(true) + 1);
  const first = rows.indexOf(shown[0]);
  const most = Math.max(...cells.flat());
  const [left, bottom] = [44, 26];
  const columns = cells[0]?.length ?? 0;
  const [w, h] = [(width - left) / columns, (height - bottom) / shown.length];
  const times = data[0]?.fields[0].values ?? [];
  const ticks = times.map((at, i) => ({ at, i })).filter(({ at }) => at % 7200000 === 0);
  return (
    <svg width={width} height={height} style={{ fontSize: 12, fill: theme.colors.text.primary }}>
      {shown.map((row, at) => (
        <g key={row.bound}>
          <text x={left - 8} y={height - bottom - (at + 0.5) * h + 4} textAnchor="end">
            {row.bound === Infinity ? 'more' : row.bound}
          </text>
          {cells[first + at].map((count, column) =>
            count < 0.5 ? null : (
              <rect
                key={column}
                x={left + column * w}
                y={height - bottom - (at + 1) * h + 0.5}
                width={w + 0.4}
                height={h - 1}
                fill={BLUES[Math.min(Math.ceil(Math.sqrt(count / most) * (BLUES.length - 1)), BLUES.length - 1)]}
              />
            )
          )}
        </g>
      ))}
      {ticks.map(({ at, i }) => (
        <text key={i} x={left + i * w} y={height - 6} textAnchor="middle">
          {new Date(at).toISOString().slice(11, 16)}
        </text>
      ))}
    </svg>
  );
}

function Rows({ data, width, height }) {
  if (!data.length) {
    return <Nothing width={width} height={height} />;
  }
  const fields = data[0].fields;
  const cell = { padding: '1px 12px', textAlign: 'right', fontSize: 13 };
  return (
    <table style={{ width, fontVariantNumeric: 'tabular-nums', lineHeight: '18px' }}>
      <thead>
        <tr>
          {fields.map((field) => (
            <th key={field.name} style={{ ...cell, fontWeight: 500 }}>
              {getFieldDisplayName(field, data[0], data)}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {[...Array(data[0].length).keys()].map((row) => (
          <tr key={row}>
            {fields.map((field) => (
              <td key={field.name} style={cell}>
                {formattedValueToString(field.display(field.values[row]))}
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

const Nothing = ({ width, height }) => (
  <div style={{ width, height, display: 'grid', placeItems: 'center' }}>No data</div>
);

const KINDS = { stat: Big, timeseries: Lines, heatmap: HeatMap, table: Rows };

function range() {
  const moments = { from: settings.from * 1000, to: settings.to * 1000 };
  const moment = (at) => ({ valueOf: () => at, toISOString: () => new Date(at).toISOString() });
  return { from: moment(moments.from), to: moment(moments.to), raw: { from: 'now', to: 'now' } };
}

function Panel({ panel, data }) {
  const place = panel.gridPos;
  const width = place.w * COLUMN - GAP;
  const height = place.h * ROW - GAP;
  const Kind = KINDS[panel.type];
  return (
    <div style={{ position: 'absolute', left: place.x * COLUMN, top: place.y * ROW }}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
        {(innerWidth, innerHeight) => (
          <Kind panel={panel} data={data} width={innerWidth} height={innerHeight} />
        )}
      </PanelChrome>
    </div>
  );
}

function Heading({ panel }) {
  return (
    <div
      style={{
        position: 'absolute',
        left: 2,
        top: panel.gridPos.y * ROW + 6,
        fontWeight: 500,
        color: theme.colors.text.primary,
      }}
    >
      {panel.title}
    </div>
  );
}

function Page({ dashboard, data }) {
  const bottom = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const chosen = dashboard.templating.list
    .filter(({ name }) => settings.shown.includes(name))
    .map(({ name, label }) => `${label}: ${settings.variables[name]}`);
  return (
    <ThemeContext.Provider value={theme}>
      <div id="page" style={{ width: 24 * COLUMN, padding: 12, color: theme.colors.text.primary }}>
        <div style={{ fontSize: 18, padding: '2px 2px 12px' }}>
          {dashboard.title}
          <span style={{ fontSize: 13, color: theme.colors.text.secondary, marginLeft: 16 }}>
            {chosen.join('   ·   ')}
          </span>
        </div>
        <div style={{ position: 'relative', height: bottom * ROW }}>
          {dashboard.panels.map((panel) =>
            panel.type === 'row' ? (
              <Heading key={panel.id} panel={panel} />
            ) : (
              <Panel key={panel.id} panel={panel} data={data[panel.id]} />
            )
          )}
        </div>
      </div>
    </ThemeContext.Provider>
  );
}

const settings = window.settings;
const dashboard = settings.dashboard;
const shown = dashboard.panels.filter(({ type }) => type !== 'row');
const data = Object.fromEntries(
  await Promise.all(shown.map(async (panel) => [panel.id, await dataOf(panel)]))
);
createRoot(document.getElementById('root')).render(<Page dashboard={dashboard} data={data} />);
window.setTimeout(() => document.body.setAttribute('data-drawn', 'yes'), 1500);
